//! What every launcher needs: loaded kernels, checks before the launch, errors.

use crate::modules::Kernel;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaStream, DevicePtr, DriverError};
use cudarc::nvrtc::Ptx;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Why a kernel was not launched, or failed to.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A tensor has another number of elements than the call's shape implies.
    #[error("{tensor} holds {found} elements where {expected} were expected")]
    Length {
        /// The parameter's name.
        tensor: &'static str,
        /// The number of elements that the shape implies.
        expected: u64,
        /// The number that was given.
        found: u64,
    },
    /// A tensor starts at an address that the kernel's wide accesses cannot use.
    #[error("{tensor} must start at a multiple of {bytes} bytes")]
    Misaligned {
        /// The parameter's name.
        tensor: &'static str,
        /// The alignment that is needed.
        bytes: u64,
    },
    /// A parameter has a value that the kernel does not support.
    #[error("{parameter} is {found}: {expected}")]
    Parameter {
        /// The parameter's name.
        parameter: &'static str,
        /// The value that was given.
        found: u64,
        /// What it must be.
        expected: &'static str,
    },
    /// The device is too old, or not the one that the kernel was written for.
    #[error(
        "the kernel {kernel} is for compute capability {}.{}, and this device has {}.{}",
        needs.0, needs.1, device.0, device.1
    )]
    Capability {
        /// The kernel's name.
        kernel: &'static str,
        /// The capability that it needs.
        needs: (i32, i32),
        /// The capability of the device.
        device: (i32, i32),
    },
    /// The CUDA driver refused.
    #[error("the CUDA driver: {0}")]
    Driver(#[from] DriverError),
}

/// The kernels of one CUDA context. A module is handed to the driver when one of its kernels is
/// first asked for, and kept.
#[derive(Debug)]
pub struct Kernels {
    context: Arc<CudaContext>,
    capability: (i32, i32),
    modules: Mutex<HashMap<&'static str, Arc<CudaModule>>>,
}

impl Kernels {
    /// Nothing is loaded yet.
    pub fn new(context: &Arc<CudaContext>) -> Result<Kernels, LaunchError> {
        Ok(Kernels {
            context: context.clone(),
            capability: context.compute_capability()?,
            modules: Mutex::default(),
        })
    }

    /// The context that the kernels run in.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// The device's compute capability (major, minor).
    pub fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// The function to launch for `kernel`.
    pub fn function(&self, kernel: &'static Kernel) -> Result<CudaFunction, LaunchError> {
        let module = kernel.module;
        if !module.runs_on(self.capability) {
            return Err(LaunchError::Capability {
                kernel: kernel.name,
                needs: module.capability,
                device: self.capability,
            });
        }
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = match modules.get(module.source) {
            Some(loaded) => loaded,
            None => {
                let loaded = self.context.load_module(Ptx::from_src(module.ptx))?;
                modules.entry(module.source).or_insert(loaded)
            }
        };
        Ok(loaded.load_function(kernel.name)?)
    }
}

/// Checks that `tensor` holds the number of elements that the shape implies.
pub(crate) fn check_length(
    tensor: &'static str,
    found: usize,
    expected: u64,
) -> Result<(), LaunchError> {
    let found = found as u64;
    if found == expected {
        Ok(())
    } else {
        Err(LaunchError::Length {
            tensor,
            expected,
            found,
        })
    }
}

/// Checks that `tensor` starts at a multiple of `bytes`, as an access of that width needs.
pub(crate) fn check_alignment<T>(
    tensor: &'static str,
    view: &impl DevicePtr<T>,
    stream: &CudaStream,
    bytes: u64,
) -> Result<(), LaunchError> {
    let (address, _synchronized) = view.device_ptr(stream);
    if address.is_multiple_of(bytes) {
        Ok(())
    } else {
        Err(LaunchError::Misaligned { tensor, bytes })
    }
}

/// A grid dimension: as many blocks of `per_block` items as cover `items`.
pub(crate) fn blocks(
    parameter: &'static str,
    items: u64,
    per_block: u64,
    limit: u32,
) -> Result<u32, LaunchError> {
    let blocks = items.div_ceil(per_block);
    match u32::try_from(blocks) {
        Ok(blocks) if blocks <= limit => Ok(blocks),
        _ => Err(LaunchError::Parameter {
            parameter,
            found: items,
            expected: "the grid of a kernel cannot cover as many",
        }),
    }
}

/// The most blocks along x.
pub(crate) const GRID_X: u32 = i32::MAX as u32;
/// The most blocks along y or z.
pub(crate) const GRID_YZ: u32 = u16::MAX as u32;
