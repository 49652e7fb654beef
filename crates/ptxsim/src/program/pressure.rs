//! How many registers are live at once, from above: a register counts from the first instruction that
//! names it to the last, in the order of the text, and to the end of a loop that it enters from outside
//! and is named in.

use std::collections::HashMap;

use super::{Instr, Op, Reg};

/// Where registers are named.
#[derive(Default)]
pub(super) struct Mentions {
    /// First and last instruction, by whether the register has 64 bits and its number.
    spans: HashMap<(bool, u32), (u32, u32)>,
}

impl Mentions {
    pub fn note(&mut self, reg: Reg, pc: u32) {
        let key = match reg {
            Reg::Word(slot, _) => (false, slot.0),
            Reg::Wide(slot) => (true, slot.0),
            Reg::Predicate(_) | Reg::Sink => return,
        };
        let span = self.spans.entry(key).or_insert((pc, pc));
        span.1 = span.1.max(pc);
    }

    /// The most 32-bit registers that are live at once.
    pub fn most_live(self, code: &[Instr]) -> u32 {
        let mut loops: Vec<(u32, u32)> = Vec::new();
        for (pc, instr) in code.iter().enumerate() {
            let targets = match &instr.op {
                Op::Branch { target } => std::slice::from_ref(target),
                Op::BranchIndexed { targets, .. } => targets,
                _ => continue,
            };
            let back = targets.iter().filter(|&&target| target <= pc as u32);
            loops.extend(back.map(|&target| (target, pc as u32)));
        }
        // Inner loops end first, so an extension reaches the outer ones.
        loops.sort_by_key(|&(_, end)| end);
        let mut changes = vec![0i32; code.len() + 1];
        for ((wide, _), (first, mut last)) in self.spans {
            for &(start, end) in &loops {
                if first < start && (start..end).contains(&last) {
                    last = end;
                }
            }
            let size = if wide { 2 } else { 1 };
            changes[first as usize] += size;
            changes[last as usize] -= size;
        }
        let live = changes.iter().scan(0, |live, change| {
            *live += change;
            Some(*live)
        });
        live.max().unwrap_or(0) as u32
    }
}
