//! The checks and counters that a launch asked for, as one observer.

use std::sync::{Mutex, PoisonError};

use super::checks::{
    AsyncCopies, BlockRaces, GlobalRaces, ProxyCheck, SharedRaces, Uninitialized, Warpgroups,
};
use super::order::Clocks;
use super::traffic::{Unique, bank_conflicts, sectors};
use super::{Counters, MemoryEvent, Observer, Site, Verdict};
use crate::exec::{Launch, owner};
use crate::program::{Class, Instr, Op};
use crate::report::{AccessKind, Space};

/// What the blocks of a launch share.
pub(crate) struct Watch {
    counting: Option<(Mutex<Counters>, Unique)>,
    global_races: Option<GlobalRaces>,
    idle: bool,
}

impl Watch {
    pub fn new(launch: &Launch<'_>) -> Watch {
        let checks = launch.config.checks;
        let several = launch.blocks() > 1 || launch.threads() > 1;
        let counting = launch
            .config
            .counters
            .then(|| (Mutex::default(), Unique::new(launch)));
        let watches = checks.uninitialized
            || checks.shared_races
            || checks.global_races
            || checks.async_copies;
        Watch {
            idle: !watches && counting.is_none(),
            counting,
            global_races: (checks.global_races && several).then(|| GlobalRaces::new(launch)),
        }
    }

    /// Whether there is nothing to watch.
    pub fn is_idle(&self) -> bool {
        self.idle
    }

    pub fn into_counters(self) -> Option<Counters> {
        let (counters, unique) = self.counting?;
        let mut counters = counters
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        [counters.unique_read_bytes, counters.unique_write_bytes] = unique.bytes();
        Some(counters)
    }
}

/// Watches one cluster.
#[derive(Default)]
pub(crate) struct Watcher<'w> {
    watch: Option<&'w Watch>,
    counters: Option<Counters>,
    uninitialized: Option<Uninitialized>,
    async_copies: Option<AsyncCopies>,
    clocks: Option<Clocks>,
    shared_races: Option<SharedRaces>,
    /// By rank.
    global_races: Vec<BlockRaces>,
    /// Only where the program has instructions of the asynchronous proxy.
    proxy: Option<ProxyCheck>,
    /// Only where it has `wgmma`.
    warpgroups: Option<Warpgroups>,
}

impl<'w> Watcher<'w> {
    pub fn new(watch: &'w Watch, launch: &Launch<'_>, cluster: u32) -> Watcher<'w> {
        let checks = launch.config.checks;
        let shared = launch.shared_bytes > 0;
        let shared_races = checks.shared_races && shared;
        let global_races = watch.global_races.is_some();
        let proxy = checks.async_copies && launch.program.uses_async_proxy();
        Watcher {
            watch: Some(watch),
            counters: watch.counting.is_some().then(Counters::default),
            uninitialized: checks.uninitialized.then(|| Uninitialized::new(launch)),
            async_copies: (checks.async_copies && shared).then(|| AsyncCopies::new(launch)),
            clocks: (shared_races || global_races).then(|| Clocks::new(launch)),
            shared_races: shared_races.then(|| SharedRaces::new(launch, cluster)),
            global_races: match global_races {
                true => (0..launch.cluster_blocks())
                    .map(|_| BlockRaces::default())
                    .collect(),
                false => Vec::new(),
            },
            proxy: proxy.then(|| ProxyCheck::new(launch)),
            warpgroups: (checks.async_copies && launch.program.uses_warpgroups())
                .then(|| Warpgroups::new(launch)),
        }
    }
}

impl<'w> Watcher<'w> {
    /// What the order of blocks is kept in.
    fn ordering(&mut self, site: &Site) -> Option<(&mut BlockRaces, &'w GlobalRaces)> {
        let races = self.watch?.global_races.as_ref()?;
        Some((&mut self.global_races[site.rank as usize], races))
    }
}

impl Drop for Watcher<'_> {
    fn drop(&mut self) {
        if let (
            Some(own),
            Some(Watch {
                counting: Some((total, _)),
                ..
            }),
        ) = (&self.counters, self.watch)
        {
            total
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .add(own);
        }
    }
}

impl Observer for Watcher<'_> {
    fn issue(&mut self, launch: &Launch<'_>, site: &Site, instr: &Instr) -> Verdict {
        if let Some(check) = &mut self.warpgroups {
            check.issue(launch, site, instr)?;
        }
        if let Some(counters) = &mut self.counters {
            count_instruction(counters, site, instr);
        }
        Ok(())
    }

    fn diverged(&mut self) {
        if let Some(counters) = &mut self.counters {
            counters.divergent_branches += 1;
        }
    }

    fn access(&mut self, launch: &Launch<'_>, site: &Site, event: &MemoryEvent<'_>) -> Verdict {
        let Some(watch) = self.watch else {
            return Ok(());
        };
        if let (Some(counters), Some((_, unique))) = (&mut self.counters, &watch.counting) {
            count(counters, unique, launch, site, event);
        }
        if let Some(check) = &self.async_copies {
            check.access(launch, site, event)?;
        }
        if let Some(check) = &mut self.uninitialized {
            check.access(launch, site, event)?;
        }
        if let Some(clocks) = &self.clocks {
            if let Some(check) = &mut self.shared_races {
                check.access(launch, clocks, site, event)?;
            }
            if let Some(races) = &watch.global_races {
                let own = &self.global_races[site.rank as usize];
                own.access(races, clocks, launch, site, event)?;
            }
        }
        if let Some(proxy) = &mut self.proxy {
            proxy.access(site, event);
        }
        Ok(())
    }

    fn copy_issued(
        &mut self,
        launch: &Launch<'_>,
        site: &Site,
        to: &[u64; 32],
        bytes: u32,
    ) -> Verdict {
        if let (Some(clocks), Some(check)) = (&self.clocks, &mut self.shared_races) {
            check.copy_issued(launch, clocks, site, to, bytes)?;
        }
        match &mut self.async_copies {
            Some(check) => check.issued(launch, site, to, bytes),
            None => Ok(()),
        }
    }

    fn copy_landed(&mut self, site: &Site, lane: usize, to: u32, bytes: u32) {
        if let Some(check) = &mut self.async_copies {
            check.landed(site.rank, to, bytes);
        }
        if let Some(check) = &mut self.uninitialized {
            check.shared_written(site.rank, to.into(), bytes);
        }
        if let (Some(clocks), Some(check)) = (&self.clocks, &mut self.shared_races) {
            check.copy_landed(clocks.now(site, lane), site, to, bytes);
        }
    }

    fn mbarrier_arrived(&mut self, site: &Site, address: u64) {
        if let Some(clocks) = &mut self.clocks {
            clocks.mbarrier_arrived(site, owner(address, site.rank));
        }
    }

    fn mbarrier_waited(&mut self, site: &Site, address: u64) {
        if let Some(clocks) = &mut self.clocks {
            clocks.mbarrier_waited(site, owner(address, site.rank));
        }
        if let Some(proxy) = &mut self.proxy {
            proxy.synchronized(site.rank);
        }
    }

    fn bulk_landed(&mut self, rank: u32, to: u32, bytes: u32) {
        if let Some(check) = &mut self.async_copies {
            check.landed(rank, to, bytes);
        }
        if let Some(check) = &mut self.uninitialized {
            check.shared_written(rank, to.into(), bytes);
        }
        if let Some(check) = &mut self.shared_races {
            check.bulk_landed(rank, to, bytes);
        }
        if let Some(proxy) = &mut self.proxy {
            proxy.landed(rank, to, bytes);
        }
    }

    fn async_read(&mut self, launch: &Launch<'_>, site: &Site, from: u32, bytes: u32) -> Verdict {
        match &self.proxy {
            Some(proxy) => proxy.async_read(launch, site, from, bytes),
            None => Ok(()),
        }
    }

    fn proxy_fence(&mut self, site: &Site) {
        if let Some(proxy) = &mut self.proxy {
            proxy.fence(site);
        }
    }

    fn local_written(&mut self, site: &Site, lane: usize, address: u64, bytes: u32) {
        if let Some(check) = &mut self.uninitialized {
            check.local_written(site, lane, address, bytes);
        }
    }

    fn synchronized(&mut self, rank: u32, waited: &[u32], arrived: &[u32]) {
        if let Some(clocks) = &mut self.clocks {
            clocks.synchronized(rank as usize, waited, arrived);
        }
        if let Some(proxy) = &mut self.proxy {
            proxy.synchronized(rank);
        }
    }

    fn warp_synchronized(&mut self, rank: u32, warp: u32) {
        if let Some(clocks) = &mut self.clocks {
            clocks.warp_synchronized(rank as usize, warp as usize);
        }
    }

    fn cluster_arrived(&mut self, site: &Site, phase: u64) {
        if let Some(clocks) = &mut self.clocks {
            clocks.cluster_arrived(site, phase);
        }
    }

    fn cluster_waited(&mut self, site: &Site, phase: u64) {
        if let Some(clocks) = &mut self.clocks {
            clocks.cluster_waited(site, phase);
        }
        if let Some(proxy) = &mut self.proxy {
            proxy.synchronized(site.rank);
        }
    }

    fn fence(&mut self, site: &Site, device: bool) {
        if let Some(own) = self.global_races.get_mut(site.rank as usize) {
            own.fence(device);
        }
    }

    fn releasing(&mut self, site: &Site, release: bool) {
        if let Some((own, races)) = self.ordering(site) {
            own.releasing(races, site.block, release);
        }
    }

    fn acquiring(&mut self, site: &Site, acquire: bool) {
        if let Some((own, races)) = self.ordering(site) {
            own.acquiring(races, acquire);
        }
    }
}

fn count(
    counters: &mut Counters,
    unique: &Unique,
    launch: &Launch<'_>,
    site: &Site,
    event: &MemoryEvent<'_>,
) {
    match event.space {
        Space::Global | Space::Const => {
            let bytes = u64::from(event.bytes) * u64::from(site.active.count_ones());
            let sectors = sectors(site, event);
            if matches!(event.kind, AccessKind::Read | AccessKind::Atomic) {
                counters.global_read_bytes += bytes;
                counters.global_read_sectors += sectors;
            }
            if matches!(event.kind, AccessKind::Write | AccessKind::Atomic) {
                counters.global_write_bytes += bytes;
                counters.global_write_sectors += sectors;
            }
            unique.touch(launch, site, event);
        }
        Space::Shared => {
            counters.shared_accesses += 1;
            counters.bank_conflicts += bank_conflicts(site, event);
        }
        Space::Local | Space::Param => {}
    }
}

fn count_instruction(counters: &mut Counters, site: &Site, instr: &Instr) {
    if instr.class == Class::Step {
        return;
    }
    let lanes = u64::from(site.active.count_ones());
    counters.instructions += 1;
    counters.thread_instructions += lanes;
    match instr.class {
        Class::Integer => counters.integer_instructions += 1,
        Class::Float => counters.float_instructions += 1,
        Class::Matrix => counters.matrix_instructions += 1,
        Class::Memory => counters.memory_instructions += 1,
        Class::Control => counters.control_instructions += 1,
        Class::Synchronization | Class::Step => {}
    }
    match instr.class {
        Class::Matrix => counters.tensor_flops += u64::from(instr.flops),
        _ => counters.flops += u64::from(instr.flops) * lanes,
    }
    match instr.op {
        Op::Barrier(_) => counters.barriers += 1,
        Op::AsyncCopy(_) => counters.async_copies += lanes,
        _ => {}
    }
}
