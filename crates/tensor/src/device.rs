use crate::{
    MemoryUse, Result,
    pool::{Buffer, Pool},
};
use std::{fmt, sync::Arc};

/// Where tensors live and operations run. Clones share one memory pool.
#[derive(Clone)]
pub struct Device {
    pool: Arc<Pool>,
}

impl Device {
    /// The CPU, with a memory pool of its own: the buffers of dropped tensors are reused.
    pub fn cpu() -> Device {
        Device {
            pool: Arc::default(),
        }
    }

    /// What the tensors of this device take.
    pub fn memory(&self) -> MemoryUse {
        self.pool.memory()
    }

    /// Lets the recorded peak start again at what is in use now.
    pub fn reset_peak(&self) {
        self.pool.reset_peak();
    }

    /// Frees the buffers that are kept for reuse.
    pub fn trim(&self) {
        self.pool.trim();
    }

    pub(crate) fn allocate(&self, bytes: usize) -> Result<Buffer> {
        self.pool.take(bytes)
    }

    /// Room for `len` f32 values that an operation needs while it runs.
    pub(crate) fn scratch(&self, len: usize) -> Result<Buffer> {
        self.pool.take(len * size_of::<f32>())
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cpu")
    }
}
