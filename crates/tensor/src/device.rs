#[cfg(feature = "cuda")]
use crate::cuda::Cuda;
use crate::{
    Error, Graph, MemoryUse, Purpose, Result,
    pool::{Buffer, Heap, Pool},
};
#[cfg(feature = "cuda")]
use fuselora_kernels::{Kernels, LaunchError};
use std::{fmt, sync::Arc};

/// Where tensors live and operations run. Clones share one memory pool.
#[derive(Clone)]
pub struct Device(Backend);

#[derive(Clone)]
pub(crate) enum Backend {
    Cpu(Arc<Pool<Heap>>),
    #[cfg(feature = "cuda")]
    Cuda(Arc<Cuda>),
}

impl Device {
    /// The CPU, with a memory pool of its own: the buffers of dropped tensors are reused.
    pub fn cpu() -> Device {
        Device(Backend::Cpu(Pool::new(Heap)))
    }

    /// The CUDA device of this number, with one stream on which everything happens in order.
    ///
    /// # Errors
    /// When there is no driver or no such device, or either is too old for the kernels.
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: usize) -> Result<Device> {
        Ok(Device(Backend::Cuda(Arc::new(Cuda::open(ordinal)?))))
    }

    /// The number of CUDA devices of this machine; 0 where there is no driver.
    #[cfg(feature = "cuda")]
    pub fn cuda_count() -> usize {
        crate::cuda::count()
    }

    /// Whether it is the CPU.
    pub fn is_cpu(&self) -> bool {
        matches!(self.0, Backend::Cpu(_))
    }

    /// Whether tensors of both can meet in one operation: all CPU devices are one, and a CUDA device is its clones.
    pub fn is_same(&self, other: &Device) -> bool {
        match (&self.0, &other.0) {
            (Backend::Cpu(_), Backend::Cpu(_)) => true,
            #[cfg(feature = "cuda")]
            (Backend::Cuda(one), Backend::Cuda(other)) => Arc::ptr_eq(one, other),
            #[cfg(feature = "cuda")]
            _ => false,
        }
    }

    /// Waits until everything that was started on it is done.
    ///
    /// # Errors
    /// When something that was started has failed.
    pub fn synchronize(&self) -> Result<()> {
        match &self.0 {
            Backend::Cpu(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => cuda.synchronize(),
        }
    }

    /// Whether it can [`capture`](Device::capture): a CUDA device, unless `CUDA_LAUNCH_BLOCKING=1` asks for every kernel
    /// to be launched by itself.
    pub fn captures(&self) -> bool {
        let blocking = std::env::var_os("CUDA_LAUNCH_BLOCKING");
        !self.is_cpu() && blocking.is_none_or(|value| value != "1")
    }

    /// What `work` would do on this device, captured instead of done: kernels with their arguments, copies within the
    /// device, the memory that they use. Memory comes from what earlier work has given back, so `work` should have been
    /// done once before. It may start nothing on other devices, and no other thread may use this one meanwhile.
    ///
    /// # Errors
    /// What `work` returns; [`Error::OutOfMemory`] where it needs more memory than was given back;
    /// [`Error::NotCaptured`] where it copies from or to the host or waits for the device, where a tensor that it made
    /// outlives it, or where the device captures nothing. Nothing was done then either.
    pub fn capture<E: From<Error>>(
        &self,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Graph, E> {
        match &self.0 {
            Backend::Cpu(_) => {
                drop(work);
                Err(Error::NotCaptured(format!("{self} has no graphs")).into())
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => Ok(Graph::of_cuda(cuda.capture(work)?)),
        }
    }

    /// What the tensors of this device take.
    pub fn memory(&self) -> MemoryUse {
        match &self.0 {
            Backend::Cpu(pool) => pool.memory(),
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => cuda.pool().memory(),
        }
    }

    /// Lets the recorded peak start again at what is in use now.
    pub fn reset_peak(&self) {
        match &self.0 {
            Backend::Cpu(pool) => pool.reset_peak(),
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => cuda.pool().reset_peak(),
        }
    }

    /// Frees the buffers that are kept for reuse.
    pub fn trim(&self) {
        match &self.0 {
            Backend::Cpu(pool) => pool.trim(),
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => cuda.pool().trim(),
        }
    }

    /// Until the returned guard is dropped, the memory of new tensors counts for `purpose`.
    pub fn hold(&self, purpose: Purpose) -> Holding {
        let before = self.set_purpose(purpose);
        Holding {
            device: self.clone(),
            before,
        }
    }

    fn set_purpose(&self, purpose: Purpose) -> Purpose {
        match &self.0 {
            Backend::Cpu(pool) => pool.hold(purpose),
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => cuda.pool().hold(purpose),
        }
    }

    pub(crate) fn backend(&self) -> &Backend {
        &self.0
    }

    /// Runs a launcher on a CUDA device.
    #[cfg(feature = "cuda")]
    pub(crate) fn launch(
        &self,
        launcher: impl FnOnce(&Kernels) -> std::result::Result<(), LaunchError>,
    ) -> Result<()> {
        match &self.0 {
            Backend::Cpu(_) => Err(crate::Error::Device {
                name: "a kernel's tensors".into(),
                expected: "a CUDA device".into(),
                found: self.to_string(),
            }),
            Backend::Cuda(cuda) => cuda.launch(launcher),
        }
    }

    /// Room on the CPU for `len` f32 values that an operation needs while it runs.
    pub(crate) fn scratch(&self, len: usize) -> Result<Buffer<Heap>> {
        match &self.0 {
            Backend::Cpu(pool) => pool.take(len * size_of::<f32>(), Some(Purpose::Workspace)),
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => Err(crate::Error::Device {
                name: "scratch memory".into(),
                expected: "the cpu".into(),
                found: self.to_string(),
            }),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Backend::Cpu(_) => f.write_str("the cpu"),
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => cuda.fmt(f),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Lets a device's memory count for one purpose, and for what it counted before when dropped: [`Device::hold`].
#[must_use]
pub struct Holding {
    device: Device,
    before: Purpose,
}

impl Drop for Holding {
    fn drop(&mut self) {
        self.device.set_purpose(self.before);
    }
}
