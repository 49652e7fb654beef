//! The checks and counters that a launch asked for, as one observer.

use crate::exec::Launch;

use super::checks::ProxyCheck;
use super::{Checks, Counters, MemoryEvent, Observer, Site, Verdict};

/// What a launch asked for.
pub(crate) struct Watch {
    checks: Checks,
}

impl Watch {
    pub fn new(launch: &Launch<'_>) -> Watch {
        Watch {
            checks: launch.config.checks,
        }
    }

    /// Whether nothing was asked for.
    pub fn is_idle(&self) -> bool {
        !self.checks.async_copies
    }

    pub fn into_counters(self) -> Option<Counters> {
        None
    }
}

/// Watches one block.
pub(crate) struct Watcher {
    /// Only where the program has instructions of the asynchronous proxy.
    proxy: Option<ProxyCheck>,
}

impl Watcher {
    pub fn new(watch: &Watch, launch: &Launch<'_>, _block: u32) -> Watcher {
        let proxy = watch.checks.async_copies && launch.program.uses_async_proxy();
        Watcher {
            proxy: proxy.then(|| ProxyCheck::new(launch)),
        }
    }
}

impl Observer for Watcher {
    fn access(&mut self, _launch: &Launch<'_>, site: &Site, event: &MemoryEvent<'_>) -> Verdict {
        if let Some(proxy) = &mut self.proxy {
            proxy.access(site, event);
        }
        Ok(())
    }

    fn mbarrier_waited(&mut self, _site: &Site, _address: u64) {
        if let Some(proxy) = &mut self.proxy {
            proxy.synchronized();
        }
    }

    fn bulk_landed(&mut self, to: u32, bytes: u32) {
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

    fn synchronized(&mut self, _waited: &[u32], _arrived: &[u32]) {
        if let Some(proxy) = &mut self.proxy {
            proxy.synchronized();
        }
    }
}
