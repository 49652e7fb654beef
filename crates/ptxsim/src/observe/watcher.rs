//! The checks and counters that a launch asked for, as one observer.

use std::sync::{Mutex, PoisonError};

use super::checks::{AsyncCopies, BlockRaces, GlobalRaces, ProxyCheck, SharedRaces, Uninitialized};
use super::traffic::{Unique, bank_conflicts, sectors};
use super::{Counters, MemoryEvent, Observer, Site, Verdict};
use crate::exec::Launch;
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
        let several = launch.blocks() > 1;
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

/// Watches one block.
pub(crate) struct Watcher<'w> {
    watch: &'w Watch,
    block: u32,
    counters: Option<Counters>,
    uninitialized: Option<Uninitialized>,
    async_copies: Option<AsyncCopies>,
    shared_races: Option<SharedRaces>,
    global_races: BlockRaces,
    /// Only where the program has instructions of the asynchronous proxy.
    proxy: Option<ProxyCheck>,
}

impl<'w> Watcher<'w> {
    pub fn new(watch: &'w Watch, launch: &Launch<'_>, block: u32) -> Watcher<'w> {
        let checks = launch.config.checks;
        let shared = launch.shared_bytes > 0;
        // What blocks of a cluster do to each other's shared memory is not seen here.
        let alone = launch.config.cluster == [1; 3];
        let proxy = checks.async_copies && launch.program.uses_async_proxy();
        Watcher {
            watch,
            block,
            counters: watch.counting.is_some().then(Counters::default),
            uninitialized: checks.uninitialized.then(|| Uninitialized::new(launch)),
            async_copies: (checks.async_copies && shared).then(|| AsyncCopies::new(launch)),
            shared_races: (checks.shared_races && shared && alone)
                .then(|| SharedRaces::new(launch)),
            global_races: BlockRaces::default(),
            proxy: proxy.then(|| ProxyCheck::new(launch)),
        }
    }
}

impl Drop for Watcher<'_> {
    fn drop(&mut self) {
        if let (Some(own), Some((total, _))) = (&self.counters, &self.watch.counting) {
            total
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .add(own);
        }
    }
}

impl Observer for Watcher<'_> {
    fn issue(&mut self, site: &Site, instr: &Instr) {
        let Some(counters) = &mut self.counters else {
            return;
        };
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

    fn diverged(&mut self) {
        if let Some(counters) = &mut self.counters {
            counters.divergent_branches += 1;
        }
    }

    fn access(&mut self, launch: &Launch<'_>, site: &Site, event: &MemoryEvent<'_>) -> Verdict {
        if let (Some(counters), Some((_, unique))) = (&mut self.counters, &self.watch.counting) {
            count(counters, unique, launch, site, event);
        }
        if let Some(check) = &self.async_copies {
            check.access(launch, site, event)?;
        }
        if let Some(check) = &mut self.uninitialized {
            check.access(launch, site, event)?;
        }
        if let Some(check) = &mut self.shared_races {
            check.access(launch, site, event)?;
        }
        if let Some(races) = &self.watch.global_races {
            self.global_races.access(races, launch, site, event)?;
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
        if let Some(check) = &mut self.shared_races {
            check.copy_issued(launch, site, to, bytes)?;
        }
        match &mut self.async_copies {
            Some(check) => check.issued(launch, site, to, bytes),
            None => Ok(()),
        }
    }

    fn copy_landed(&mut self, site: &Site, lane: usize, to: u32, bytes: u32) {
        if let Some(check) = &mut self.async_copies {
            check.landed(to, bytes);
        }
        if let Some(check) = &mut self.uninitialized {
            check.shared_written(to.into(), bytes);
        }
        if let Some(check) = &mut self.shared_races {
            check.copy_landed(site, lane, to, bytes);
        }
    }

    fn mbarrier_arrived(&mut self, site: &Site, address: u64) {
        if let Some(check) = &mut self.shared_races {
            check.mbarrier_arrived(site.warp, address);
        }
    }

    fn mbarrier_waited(&mut self, site: &Site, address: u64) {
        if let Some(check) = &mut self.shared_races {
            check.mbarrier_waited(site.warp, address);
        }
        if let Some(proxy) = &mut self.proxy {
            proxy.synchronized();
        }
    }

    fn bulk_landed(&mut self, to: u32, bytes: u32) {
        if let Some(check) = &mut self.shared_races {
            check.bulk_landed(to, bytes);
        }
        if let Some(proxy) = &mut self.proxy {
            proxy.landed(to, bytes);
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

    fn local_written(&mut self, warp: u32, lane: usize, address: u64, bytes: u32) {
        if let Some(check) = &mut self.uninitialized {
            check.local_written(warp, lane, address, bytes);
        }
    }

    fn synchronized(&mut self, waited: &[u32], arrived: &[u32]) {
        if let Some(check) = &mut self.shared_races {
            check.synchronized(waited, arrived);
        }
        if let Some(proxy) = &mut self.proxy {
            proxy.synchronized();
        }
    }

    fn warp_synchronized(&mut self, warp: u32) {
        if let Some(check) = &mut self.shared_races {
            check.warp_synchronized(warp);
        }
    }

    fn fence(&mut self) {
        self.global_races.fence();
    }

    fn releasing(&mut self, release: bool) {
        if let Some(races) = &self.watch.global_races {
            self.global_races.releasing(races, self.block, release);
        }
    }

    fn acquiring(&mut self, acquire: bool) {
        if let Some(races) = &self.watch.global_races {
            self.global_races.acquiring(races, acquire);
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
