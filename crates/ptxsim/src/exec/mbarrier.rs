//! The mbarrier object: a phase, the arrivals and the bytes that it still waits for, in 64 bits of
//! shared memory whose layout only this file knows.

use super::access::locate;
use super::block::Block;
use super::cluster::is_remote;
use super::registers::{first_lane, lanes};
use super::step::Flow;
use crate::observe::{Observer, Site};
use crate::program::{MbarrierOp, MbarrierOperation, MbarrierPhase, Reg};
use crate::report::{AccessKind, Fault, FaultKind, Space};

/// The most arrivals, and the most bytes, that a phase can wait for.
pub(super) const LIMIT: u32 = (1 << 20) - 1;

/// A decoded mbarrier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mbarrier {
    /// Parity of the current phase.
    pub phase: bool,
    /// Arrivals that the current phase still waits for.
    pub pending: u32,
    /// Arrivals that each following phase waits for.
    pub expected: u32,
    /// Bytes that the current phase still waits for; negative when they came before `expect_tx`.
    pub bytes: i32,
}

impl Mbarrier {
    /// `mbarrier.init`; `None` for a count that no barrier can have.
    pub fn new(count: u32) -> Option<Mbarrier> {
        let valid = (1..=LIMIT).contains(&count);
        valid.then_some(Mbarrier {
            phase: false,
            pending: count,
            expected: count,
            bytes: 0,
        })
    }

    /// `None` where the bits are not an initialized barrier.
    pub fn decode(bits: u64) -> Option<Mbarrier> {
        let expected = (bits >> 20) as u32 & LIMIT;
        (expected != 0).then_some(Mbarrier {
            phase: bits >> 63 == 1,
            pending: bits as u32 & LIMIT,
            expected,
            // A 22-bit signed field.
            bytes: ((bits >> 40) as u32 & 0x3f_ffff) as i32 - (1 << 21),
        })
    }

    pub fn encode(self) -> u64 {
        let bytes = (self.bytes + (1 << 21)) as u64 & 0x3f_ffff;
        u64::from(self.phase) << 63
            | bytes << 40
            | u64::from(self.expected) << 20
            | u64::from(self.pending)
    }

    /// Whether the phase of this parity has completed: it is not the current one.
    pub fn has_completed(self, parity: bool) -> bool {
        self.phase != parity
    }

    /// `count` arrivals, after which `drop` threads no longer take part. `None` if the phase does
    /// not wait for so many.
    pub fn arrive(mut self, count: u32, drop: u32) -> Option<Mbarrier> {
        self.pending = self.pending.checked_sub(count)?;
        self.expected = self.expected.checked_sub(drop)?;
        Some(self.advanced())
    }

    /// `expect_tx` with a positive, `complete_tx` with a negative number of bytes. `None` beyond the
    /// limits of the object.
    pub fn transfer(mut self, bytes: i64) -> Option<Mbarrier> {
        let sum = i64::from(self.bytes) + bytes;
        self.bytes = i32::try_from(sum)
            .ok()
            .filter(|sum| sum.unsigned_abs() <= LIMIT)?;
        Some(self.advanced())
    }

    /// `arrive.expect_tx`: the phase cannot end between the two.
    pub fn transfer_before_arrival(self, bytes: i64) -> Option<Mbarrier> {
        let held = Mbarrier {
            pending: self.pending + 1,
            ..self
        }
        .transfer(bytes)?;
        Some(Mbarrier {
            pending: held.pending - 1,
            ..held
        })
    }

    /// One more arrival that the current phase waits for.
    pub fn one_more(self) -> Option<Mbarrier> {
        (self.pending < LIMIT).then_some(Mbarrier {
            pending: self.pending + 1,
            ..self
        })
    }

    /// The next phase, when nothing is missing from this one.
    fn advanced(self) -> Mbarrier {
        match (self.pending, self.bytes) {
            (0, 0) => Mbarrier {
                phase: !self.phase,
                pending: self.expected,
                ..self
            },
            _ => self,
        }
    }
}

/// An arrival that follows the copies of its lane.
pub(super) struct Arrival {
    lane: usize,
    barrier: u64,
    pc: u32,
}

impl<O: Observer> Block<'_, O> {
    /// `mbarrier`
    pub(super) fn mbarrier(
        &mut self,
        w: usize,
        site: &Site,
        op: &MbarrierOp,
    ) -> Result<Flow, Fault> {
        for located in locate(&self.warps[w].registers, op.space, &op.address, site.active) {
            if located.space != Space::Shared {
                let what = "an mbarrier that is not in shared memory".into();
                let lane = first_lane(located.mask);
                return Err(self.fault(site, lane, FaultKind::Undefined(what)));
            }
            let kind = match op.operation {
                MbarrierOperation::Init { .. } => AccessKind::Write,
                MbarrierOperation::Wait { .. } => AccessKind::Read,
                _ => AccessKind::Atomic,
            };
            self.admit(site, &located, kind, 8, true)?;
            let site = Site {
                active: located.mask,
                ..*site
            };
            if let MbarrierOperation::Wait {
                done,
                phase,
                blocking,
            } = op.operation
            {
                let completed = self.completed(w, &site, &located.addresses, phase)?;
                if completed == 0 && blocking {
                    return Ok(Flow::Wait);
                }
                self.warps[w]
                    .registers
                    .set_predicate(done, located.mask, completed);
                continue;
            }
            for lane in lanes(located.mask) {
                self.update_mbarrier(w, &site, lane, located.addresses[lane], &op.operation)?;
            }
        }
        Ok(Flow::Next)
    }

    /// Whether a thread that waits at an mbarrier would not wait any more.
    pub(super) fn mbarrier_resumes(&self, w: usize, active: u32, op: &MbarrierOp) -> bool {
        let MbarrierOperation::Wait { phase, .. } = op.operation else {
            return true;
        };
        let registers = &self.warps[w].registers;
        locate(registers, op.space, &op.address, active).any(|located| {
            lanes(located.mask).any(|lane| {
                let address = located.addresses[lane];
                let loads = &self.cluster.loads[self.rank as usize];
                let mut arrivals = self.warps.iter().flat_map(|warp| &warp.arrivals);
                arrivals.any(|arrival| arrival.barrier == address)
                    || loads.iter().any(|load| u64::from(load.barrier) == address)
                    || self
                        .read_mbarrier(address)
                        .is_none_or(|barrier| barrier.has_completed(self.parity(w, lane, phase)))
            })
        })
    }

    fn parity(&self, w: usize, lane: usize, phase: MbarrierPhase) -> bool {
        let registers = &self.warps[w].registers;
        match phase {
            MbarrierPhase::Parity(slot) => registers.word(slot)[lane] & 1 == 1,
            MbarrierPhase::State(slot) => registers.wide(slot)[lane] >> 63 == 1,
        }
    }

    /// The lanes whose phase has completed. Loads land here, when a phase cannot complete without
    /// them: no sooner do they have to.
    fn completed(
        &mut self,
        w: usize,
        site: &Site,
        addresses: &[u64; 32],
        phase: MbarrierPhase,
    ) -> Result<u32, Fault> {
        let mut completed = 0;
        for lane in lanes(site.active) {
            if is_remote(addresses[lane]) {
                let what = "a wait at the mbarrier of another block".into();
                return Err(self.fault(site, lane, FaultKind::Undefined(what)));
            }
            let parity = self.parity(w, lane, phase);
            let mut barrier = self.initialized(site, lane, addresses[lane])?;
            if !barrier.has_completed(parity) {
                self.land_arrivals(addresses[lane])?;
                self.land_loads(site, lane, addresses[lane] as u32)?;
                barrier = self.initialized(site, lane, addresses[lane])?;
            }
            if barrier.has_completed(parity) {
                completed |= 1 << lane;
            }
        }
        for lane in lanes(completed) {
            let site = Site {
                active: 1 << lane,
                ..*site
            };
            self.observer.mbarrier_waited(&site, addresses[lane]);
        }
        Ok(completed)
    }

    /// Lands the copies whose threads arrive at the barrier after them, and the arrivals.
    fn land_arrivals(&mut self, barrier: u64) -> Result<(), Fault> {
        for w in 0..self.warps.len() {
            let arrivals = std::mem::take(&mut self.warps[w].arrivals);
            let (landing, waiting) = arrivals.into_iter().partition(|a| a.barrier == barrier);
            self.warps[w].arrivals = waiting;
            let landing: Vec<Arrival> = landing;
            for Arrival { lane, pc, .. } in landing {
                let site = self.site(w, pc, 1 << lane);
                self.wait_for_copies(w, &site, None);
                let operation = MbarrierOperation::Arrive {
                    state: Reg::Sink,
                    count: None,
                    bytes: None,
                    drop: false,
                };
                self.update_mbarrier(w, &site, lane, barrier, &operation)?;
            }
        }
        Ok(())
    }

    fn read_mbarrier(&self, address: u64) -> Option<Mbarrier> {
        let bytes = self.shared_bytes(address, 8).try_into().ok()?;
        Mbarrier::decode(u64::from_le_bytes(bytes))
    }

    fn initialized(&self, site: &Site, lane: usize, address: u64) -> Result<Mbarrier, Fault> {
        self.read_mbarrier(address).ok_or_else(|| {
            let what = format!("an mbarrier at {address:#x} that was not initialized");
            self.fault(site, lane, FaultKind::Undefined(what))
        })
    }

    fn update_mbarrier(
        &mut self,
        w: usize,
        site: &Site,
        lane: usize,
        address: u64,
        operation: &MbarrierOperation,
    ) -> Result<(), Fault> {
        let value = |slot| self.warps[w].registers.word(slot)[lane];
        let (updated, what) = match *operation {
            MbarrierOperation::Init { count } => (
                Mbarrier::new(value(count)),
                "an mbarrier waits for 1 to 2^20 - 1 arrivals",
            ),
            MbarrierOperation::Invalidate => {
                self.initialized(site, lane, address)?;
                self.shared_bytes_mut(address, 8).fill(0);
                return Ok(());
            }
            MbarrierOperation::ExpectBytes(bytes) => {
                let bytes = i64::from(value(bytes));
                (
                    self.initialized(site, lane, address)?.transfer(bytes),
                    TOO_MANY_BYTES,
                )
            }
            MbarrierOperation::CompleteBytes(bytes) => {
                let bytes = -i64::from(value(bytes));
                (
                    self.initialized(site, lane, address)?.transfer(bytes),
                    TOO_MANY_BYTES,
                )
            }
            MbarrierOperation::Arrive {
                state,
                count,
                bytes,
                drop,
            } => {
                let barrier = self.initialized(site, lane, address)?;
                let count = count.map_or(1, value);
                let bytes = bytes.map_or(0, |bytes| value(bytes).into());
                self.warps[w].registers.put(state, lane, barrier.encode());
                let arriving = Site {
                    active: 1 << lane,
                    ..*site
                };
                self.observer.mbarrier_arrived(&arriving, address);
                let expected = barrier.transfer_before_arrival(bytes);
                let updated = expected.and_then(|b| b.arrive(count, if drop { count } else { 0 }));
                (
                    updated,
                    "more arrivals at an mbarrier than its phase waits for",
                )
            }
            MbarrierOperation::ArriveAfterCopies { counted } => {
                let barrier = self.initialized(site, lane, address)?;
                self.warps[w].arrivals.push(Arrival {
                    lane,
                    barrier: address,
                    pc: site.pc,
                });
                let updated = if counted {
                    Some(barrier)
                } else {
                    barrier.one_more()
                };
                (updated, "an mbarrier waits for 1 to 2^20 - 1 arrivals")
            }
            // Waits change nothing.
            MbarrierOperation::Wait { .. } => return Ok(()),
        };
        let Some(updated) = updated else {
            return Err(self.fault(site, lane, FaultKind::Undefined(what.into())));
        };
        self.shared_bytes_mut(address, 8)
            .copy_from_slice(&updated.encode().to_le_bytes());
        Ok(())
    }

    /// `complete_tx` by a bulk load.
    pub(super) fn complete_bytes(
        &mut self,
        site: &Site,
        lane: usize,
        address: u64,
        bytes: u32,
    ) -> Result<(), Fault> {
        let updated = self
            .initialized(site, lane, address)?
            .transfer(-i64::from(bytes));
        let Some(updated) = updated else {
            return Err(self.fault(site, lane, FaultKind::Undefined(TOO_MANY_BYTES.into())));
        };
        self.shared_bytes_mut(address, 8)
            .copy_from_slice(&updated.encode().to_le_bytes());
        Ok(())
    }

    /// What a barrier waits for, in words.
    pub(super) fn describe_mbarrier(&self, address: u64) -> String {
        match self.read_mbarrier(address) {
            Some(Mbarrier { pending, bytes, .. }) => format!(
                "the mbarrier at {address:#x} of shared memory, which lacks {pending} arrivals and {bytes} bytes"
            ),
            None => format!("the mbarrier at {address:#x} of shared memory"),
        }
    }
}

const TOO_MANY_BYTES: &str = "more bytes than an mbarrier counts (2^20 - 1)";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_hold_every_field() {
        for barrier in [
            Mbarrier {
                phase: true,
                pending: 5,
                expected: LIMIT,
                bytes: LIMIT as i32,
            },
            Mbarrier {
                phase: false,
                pending: LIMIT,
                expected: 7,
                bytes: -(LIMIT as i32),
            },
        ] {
            assert_eq!(Mbarrier::decode(barrier.encode()), Some(barrier));
        }
        assert_eq!(Mbarrier::decode(0), None);
        assert_eq!(Mbarrier::new(0), None);
        assert_eq!(Mbarrier::new(LIMIT + 1), None);
    }

    #[test]
    fn a_phase_ends_with_the_last_arrival() {
        let barrier = Mbarrier::new(3).unwrap().arrive(1, 0).unwrap();
        assert!(!barrier.has_completed(false));
        // The phase before the first counts as completed.
        assert!(barrier.has_completed(true));
        let barrier = barrier.arrive(2, 0).unwrap();
        assert!(barrier.has_completed(false) && !barrier.has_completed(true));
        assert_eq!((barrier.pending, barrier.expected), (3, 3));
        assert_eq!(barrier.arrive(4, 0), None);
    }

    #[test]
    fn bytes_hold_a_phase_open_in_either_order() {
        let expected_first = Mbarrier::new(1)
            .unwrap()
            .transfer(64)
            .unwrap()
            .arrive(1, 0)
            .unwrap();
        assert!(!expected_first.has_completed(false));
        assert!(expected_first.transfer(-64).unwrap().has_completed(false));
        let completed_first = Mbarrier::new(1).unwrap().transfer(-64).unwrap();
        assert!(!completed_first.has_completed(false));
        let completed_first = completed_first.transfer(64).unwrap().arrive(1, 0).unwrap();
        assert!(completed_first.has_completed(false));
        assert_eq!(completed_first.transfer(1 << 21), None);
    }

    #[test]
    fn dropped_threads_are_missed_by_no_later_phase() {
        let barrier = Mbarrier::new(2)
            .unwrap()
            .arrive(1, 1)
            .unwrap()
            .arrive(1, 0)
            .unwrap();
        assert_eq!((barrier.pending, barrier.expected), (1, 1));
    }
}
