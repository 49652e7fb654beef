//! What orders the warps of a cluster.
//!
//! Every warp has a vector clock: what it knows of the progress of the others. A barrier joins the
//! clocks of those that meet; an mbarrier and the cluster's barrier carry what the arriving ones
//! know to those who wait. Something done earlier is ordered before a warp if the warp's clock has
//! reached its time. Lanes of one warp are ordered by running together; only what lanes do while
//! they are apart is not, and `bar.warp.sync` orders that.

use std::collections::HashMap;

use super::Site;
use crate::exec::Launch;

/// When a lane did something.
#[derive(Clone, Copy)]
pub(super) struct Moment {
    /// Number of the warp in the cluster.
    pub warp: usize,
    pub lane: u8,
    /// The warp's own clock, at least 1.
    pub time: u32,
}

/// The clocks of a cluster.
pub(super) struct Clocks {
    /// Warps of one block.
    warps: usize,
    /// `clocks[warp][other]`
    clocks: Vec<Vec<u32>>,
    /// What those who arrived at an mbarrier knew, by its block's rank and its address.
    mbarriers: HashMap<(u32, u64), Vec<u32>>,
    /// What those who arrived at the cluster's barrier knew, for a phase and the next.
    phases: [(u64, Vec<u32>); 2],
}

impl Clocks {
    pub fn new(launch: &Launch<'_>) -> Clocks {
        let count = launch.warps() * launch.cluster_blocks();
        let clock = |warp| (0..count).map(|other| u32::from(other == warp)).collect();
        Clocks {
            warps: launch.warps(),
            clocks: (0..count).map(clock).collect(),
            mbarriers: HashMap::new(),
            phases: [0, 1].map(|phase| (phase, vec![0; count])),
        }
    }

    /// Number of the site's warp in the cluster.
    pub fn warp(&self, site: &Site) -> usize {
        site.rank as usize * self.warps + site.warp as usize
    }

    /// Rank of the block that a warp of the cluster belongs to, and the warp's number there.
    pub fn place(&self, warp: usize) -> (usize, usize) {
        (warp / self.warps, warp % self.warps)
    }

    pub fn now(&self, site: &Site, lane: usize) -> Moment {
        let warp = self.warp(site);
        Moment {
            warp,
            lane: lane as u8,
            time: self.clocks[warp][warp],
        }
    }

    /// Whether what was done at `moment` is ordered before what lane `own` does at `site`.
    #[inline]
    pub fn is_ordered(&self, moment: Moment, site: &Site, own: usize) -> bool {
        let here = self.warp(site);
        let Moment { warp, lane, time } = moment;
        if warp != here {
            return self.clocks[here][warp] >= time;
        }
        let together = site.active >> lane & 1 == 1;
        usize::from(lane) == own || together || self.clocks[here][here] > time
    }

    /// Threads of a block waited for each other, with one mask of lanes per warp.
    pub fn synchronized(&mut self, rank: usize, waited: &[u32], arrived: &[u32]) {
        let first = rank * self.warps;
        let takes_part = |warp: usize| waited[warp] | arrived[warp] != 0;
        let mut joined = vec![0; self.clocks.len()];
        for warp in (0..self.warps).filter(|&warp| takes_part(warp)) {
            join(&mut joined, &self.clocks[first + warp]);
        }
        for warp in (0..self.warps).filter(|&warp| takes_part(warp)) {
            if waited[warp] != 0 {
                self.clocks[first + warp].copy_from_slice(&joined);
            }
            self.clocks[first + warp][first + warp] += 1;
        }
    }

    pub fn warp_synchronized(&mut self, rank: usize, warp: usize) {
        let warp = rank * self.warps + warp;
        self.clocks[warp][warp] += 1;
    }

    pub fn mbarrier_arrived(&mut self, site: &Site, at: (u32, u64)) {
        let warp = self.warp(site);
        let clock = &mut self.clocks[warp];
        let known = self
            .mbarriers
            .entry(at)
            .or_insert_with(|| vec![0; clock.len()]);
        join(known, clock);
        clock[warp] += 1;
    }

    pub fn mbarrier_waited(&mut self, site: &Site, at: (u32, u64)) {
        let warp = self.warp(site);
        if let Some(known) = self.mbarriers.get(&at) {
            join(&mut self.clocks[warp], known);
        }
    }

    pub fn cluster_arrived(&mut self, site: &Site, phase: u64) {
        let warp = self.warp(site);
        let (current, known) = &mut self.phases[phase as usize % 2];
        if *current != phase {
            *current = phase;
            known.fill(0);
        }
        join(known, &self.clocks[warp]);
        self.clocks[warp][warp] += 1;
    }

    pub fn cluster_waited(&mut self, site: &Site, phase: u64) {
        let warp = self.warp(site);
        join(&mut self.clocks[warp], &self.phases[phase as usize % 2].1);
    }
}

/// Brings `clock` up to what `known` knows.
fn join(clock: &mut [u32], known: &[u32]) {
    for (own, time) in clock.iter_mut().zip(known) {
        *own = (*own).max(*time);
    }
}
