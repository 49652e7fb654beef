//! Registers that `wgmma.mma_async` reads and writes on its own: no other instruction may touch the
//! accumulator, or write the fragment of A, before the product is waited for; and what other
//! instructions touched needs a `wgmma.fence` before a product takes it over. A product may take over
//! the accumulator of an earlier one as it is.

use std::collections::HashMap;

use super::super::{Site, Verdict, Violation};
use crate::exec::Launch;
use crate::exec::registers::{Slot, first_lane};
use crate::program::{Instr, Op, WarpgroupA};
use crate::report::FaultKind;

/// A product that is in flight.
struct Product {
    pc: u32,
    group: u32,
}

/// One warp's registers.
#[derive(Default)]
struct Warp {
    /// Fences so far.
    fences: u32,
    /// How many fences there had been when an ordinary instruction last touched a register.
    touched: HashMap<Slot, u32>,
    /// The last product that writes a register, or reads it as A.
    accumulators: HashMap<Slot, Product>,
    fragments: HashMap<Slot, Product>,
    committed: u32,
}

/// Watches the warps of a cluster.
pub(in super::super) struct Warpgroups {
    /// Of one block.
    count: usize,
    warps: Vec<Warp>,
}

impl Warpgroups {
    pub fn new(launch: &Launch<'_>) -> Warpgroups {
        let count = launch.warps();
        let all = 0..count * launch.cluster_blocks();
        Warpgroups {
            count,
            warps: all.map(|_| Warp::default()).collect(),
        }
    }

    pub fn issue(&mut self, launch: &Launch<'_>, site: &Site, instr: &Instr) -> Verdict {
        let warp = &mut self.warps[site.rank as usize * self.count + site.warp as usize];
        let fault = |what: String| {
            Err(Box::new(Violation {
                lane: first_lane(site.active),
                kind: FaultKind::Undefined(what),
            }))
        };
        let product = |pc: u32| launch.program.location(pc);
        match &instr.op {
            Op::WarpgroupFence => warp.fences += 1,
            Op::WarpgroupCommit => warp.committed += 1,
            Op::WarpgroupWait { pending } => {
                let committed = warp.committed;
                let waits = |product: &Product| product.group + pending >= committed;
                warp.accumulators.retain(|_, product| waits(product));
                warp.fragments.retain(|_, product| waits(product));
            }
            Op::WarpgroupMultiply(multiply) => {
                let a: &[Slot] = match &multiply.a {
                    WarpgroupA::Registers(slots) => slots,
                    WarpgroupA::Descriptor(_) => &[],
                };
                if let Some(earlier) = a.iter().find_map(|slot| warp.accumulators.get(slot)) {
                    let place = product(earlier.pc);
                    return fault(format!("A is the result, not waited for, of {place}"));
                }
                let late = |slot: &&Slot| warp.touched.get(slot) == Some(&warp.fences);
                if warp.fences == 0 || multiply.d.iter().chain(a).any(|slot| late(&slot)) {
                    let what = "a `wgmma` whose registers were used without a `wgmma.fence` since";
                    return fault(what.into());
                }
                let (pc, group) = (site.pc, warp.committed);
                for (slots, taken) in [
                    (&multiply.d[..], &mut warp.accumulators),
                    (a, &mut warp.fragments),
                ] {
                    taken.extend(slots.iter().map(|&slot| (slot, Product { pc, group })));
                }
            }
            _ => {
                let named = launch.program.named(site.pc);
                for slot in named.iter().map(|(slot, _)| slot) {
                    warp.touched.insert(*slot, warp.fences);
                }
                let read = named.iter().map(|(slot, _)| slot);
                let written = named.iter().filter(|(_, written)| *written);
                let used = read
                    .filter_map(|slot| warp.accumulators.get(slot))
                    .chain(written.filter_map(|(slot, _)| warp.fragments.get(slot)));
                if let Some(Product { pc, .. }) = { used }.next() {
                    let place = product(*pc);
                    return fault(format!("a register that is not waited for, of {place}"));
                }
            }
        }
        Ok(())
    }
}
