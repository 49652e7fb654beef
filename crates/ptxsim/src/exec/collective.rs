//! What the lanes of a warp do together.

use super::block::Block;
use super::registers::{first_lane, lanes};
use crate::observe::{Observer, Site};
use crate::program::{Reg, Shuffle, ShuffleMode, VoteMode, WarpOp};

impl<O: Observer> Block<'_, O> {
    /// `members` take part; all active lanes receive the result.
    pub(super) fn collective(&mut self, w: usize, site: &Site, members: u32, op: &WarpOp) {
        let active = site.active;
        let registers = &mut self.warps[w].registers;
        match op {
            WarpOp::Sync => self.observer.warp_synchronized(site.rank, site.warp),
            WarpOp::Vote { mode, d, p } => {
                let ballot = registers.predicate(*p) & members;
                let truth = match mode {
                    VoteMode::All => ballot == members,
                    VoteMode::Any => ballot != 0,
                    VoteMode::Uniform => ballot == 0 || ballot == members,
                    VoteMode::Ballot => false,
                };
                match d {
                    Reg::Word(d, _) => registers.set_word(*d, active, &[ballot; 32]),
                    Reg::Predicate(d) => {
                        registers.set_predicate(*d, active, if truth { u32::MAX } else { 0 });
                    }
                    Reg::Wide(_) | Reg::Sink => {}
                }
            }
            WarpOp::Match { d, all, every, a } => {
                let values: [u64; 32] = match a {
                    Reg::Wide(slot) => *registers.wide(*slot),
                    Reg::Word(slot, _) => registers.word(*slot).map(u64::from),
                    Reg::Predicate(_) | Reg::Sink => [0; 32],
                };
                let equal = |value: u64| {
                    lanes(members)
                        .filter(|&lane| values[lane] == value)
                        .fold(0u32, |mask, lane| mask | 1 << lane)
                };
                let mut masks = values.map(equal);
                if *every {
                    let same = masks[first_lane(members)] == members;
                    masks = [if same { members } else { 0 }; 32];
                    if let Some(Reg::Predicate(p)) = all {
                        registers.set_predicate(*p, active, if same { u32::MAX } else { 0 });
                    }
                }
                registers.set_word(*d, active, &masks);
            }
            WarpOp::Redux { d, a, apply } => {
                let values = registers.word(*a);
                let total = lanes(members).map(|lane| values[lane]).reduce(apply);
                registers.set_word(*d, active, &[total.unwrap_or_default(); 32]);
            }
            WarpOp::Elect { d, p } => {
                let leader = first_lane(members);
                if let Reg::Word(d, _) = d {
                    registers.set_word(*d, active, &[leader as u32; 32]);
                }
                registers.set_predicate(*p, active, 1 << leader);
            }
            WarpOp::Shuffle(shuffle) => self.shuffle(w, active, shuffle),
        }
    }

    /// 9.7.9.6 `shfl.sync`.
    fn shuffle(&mut self, w: usize, active: u32, shuffle: &Shuffle) {
        let registers = &mut self.warps[w].registers;
        let values = *registers.word(shuffle.a);
        let (b, c) = (*registers.word(shuffle.b), *registers.word(shuffle.c));
        let mut out = values;
        let mut in_range = 0u32;
        for lane in 0..32u32 {
            let (offset, control) = (b[lane as usize] & 0x1f, c[lane as usize]);
            let (clamp, segment) = (control & 0x1f, control >> 8 & 0x1f);
            let last = lane & segment | clamp & !segment;
            let first = lane & segment;
            let (source, inside) = match shuffle.mode {
                ShuffleMode::Up => {
                    let source = lane as i32 - offset as i32;
                    (source, source >= last as i32)
                }
                ShuffleMode::Down => {
                    let source = (lane + offset) as i32;
                    (source, source <= last as i32)
                }
                ShuffleMode::Butterfly => {
                    let source = (lane ^ offset) as i32;
                    (source, source <= last as i32)
                }
                ShuffleMode::Index => {
                    let source = (first | offset & !segment) as i32;
                    (source, source <= last as i32)
                }
            };
            if inside {
                in_range |= 1 << lane;
                out[lane as usize] = values[source as usize & 31];
            }
        }
        if let Reg::Word(d, _) = shuffle.d {
            registers.set_word(d, active, &out);
        }
        if let Reg::Predicate(p) = shuffle.p {
            registers.set_predicate(p, active, in_range);
        }
    }
}
