//! The lanes of a warp and where each of them is.
//!
//! Lanes at the same place form a group. Of the groups that can run, the one deepest in calls goes
//! first, then the one at the lowest instruction: compilers lay code out so that it is the one
//! that the others wait for, and groups that meet become one again.

use super::bulk::Stores;
use super::copies::Copies;
use super::mbarrier::Arrival;
use super::registers::Registers;
use super::wgmma::Products;

/// Why a group does not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Ready,
    /// Waits at an instruction for lanes that it needs.
    Parked,
    /// Waits at a block barrier.
    AtBarrier(u32),
    /// Waits at an instruction until something else has happened.
    Waiting,
}

/// Lanes at the same instruction.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group {
    pub pc: u32,
    pub mask: u32,
    /// Calls that have not returned.
    pub depth: u32,
    pub state: State,
    /// Runs an instruction although lanes that it needs are missing.
    pub forced: bool,
}

impl Group {
    /// A whole warp that has not run yet.
    pub const START: Group = Group {
        pc: 0,
        mask: u32::MAX,
        depth: 0,
        state: State::Ready,
        forced: false,
    };
}

pub(super) struct Warp {
    pub number: u32,
    pub registers: Registers,
    pub groups: Vec<Group>,
    /// Lanes that exist.
    pub lanes: u32,
    /// Return addresses of each lane: the instruction of the call.
    pub calls: Vec<Vec<u32>>,
    /// Local memory, lane after lane.
    pub local: Vec<u8>,
    pub copies: Copies,
    pub stores: Stores,
    /// Arrivals at mbarriers that wait for copies.
    pub arrivals: Vec<Arrival>,
    pub products: Products,
    /// Phases of the cluster's barrier that must have completed before each lane goes on.
    pub cluster_phase: [u64; 32],
}

impl Warp {
    /// Lanes that have not exited.
    pub fn live(&self) -> u32 {
        self.groups.iter().fold(0, |live, group| live | group.mask)
    }

    /// The group to run next.
    pub fn pick(&self) -> Option<usize> {
        let ready = self
            .groups
            .iter()
            .enumerate()
            .filter(|(_, g)| g.state == State::Ready);
        ready
            .min_by_key(|(_, g)| (u32::MAX - g.depth, g.pc))
            .map(|(index, _)| index)
    }

    /// Joins the groups that are ready at the same place as group `index`; returns its new index.
    pub fn merge(&mut self, index: usize) -> usize {
        let Group { pc, depth, .. } = self.groups[index];
        let mut mask = 0;
        self.groups.retain(|group| {
            let same = group.pc == pc && group.depth == depth && group.state == State::Ready;
            if same {
                mask |= group.mask;
            }
            !same
        });
        self.groups.push(Group {
            pc,
            mask,
            depth,
            state: State::Ready,
            forced: false,
        });
        self.groups.len() - 1
    }

    /// The lowest instruction at which a group other than `index` of the same depth is ready: the
    /// first place where they may meet.
    pub fn next_meeting(&self, index: usize) -> u32 {
        let depth = self.groups[index].depth;
        let others = self.groups.iter().enumerate();
        others
            .filter(|(other, g)| *other != index && g.state == State::Ready && g.depth == depth)
            .map(|(_, group)| group.pc)
            .min()
            .unwrap_or(u32::MAX)
    }

    /// Moves `lanes` out of group `index` into one of their own at `pc`.
    pub fn split(&mut self, index: usize, lanes: u32, pc: u32, depth: u32) -> usize {
        self.groups[index].mask &= !lanes;
        let group = Group {
            pc,
            mask: lanes,
            depth,
            state: State::Ready,
            forced: false,
        };
        if self.groups[index].mask == 0 {
            self.groups[index] = group;
            return index;
        }
        self.groups.push(group);
        self.groups.len() - 1
    }
}
