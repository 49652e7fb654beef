use super::{Call, Device};
use anyhow::Result;
use cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE;

/// Calls of one operation on several sets of tensors that take turns: as many as it takes that none is left in the
/// second-level cache when its turn comes again.
pub struct Turns {
    calls: Vec<Call>,
    next: usize,
}

impl Turns {
    /// At most `most` sets, and at least two; a call touches `bytes`.
    pub fn new(
        device: &Device,
        bytes: u64,
        most: u64,
        make: &dyn Fn(&Device) -> Result<Call>,
    ) -> Result<Turns> {
        let context = device.stream.context();
        let cache = u64::try_from(context.attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?)?;
        let sets = (2 * cache).div_ceil(bytes).clamp(2, most);
        let calls = (0..sets).map(|_| make(device)).collect::<Result<_>>()?;
        Ok(Turns { calls, next: 0 })
    }

    /// The number of sets.
    pub fn len(&self) -> usize {
        self.calls.len()
    }

    /// Submits `count` calls.
    pub fn run(&mut self, device: &Device, count: u64) -> Result<()> {
        for _ in 0..count {
            self.calls[self.next](&device.kernels)?;
            self.next = (self.next + 1) % self.calls.len();
        }
        Ok(())
    }
}
