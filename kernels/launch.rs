//! What every launcher needs: loaded kernels, the stream that they run on, errors.

use crate::modules::Kernel;
use crate::operand::Element;
use cudarc::driver::sys::CUdevice_attribute::{
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
};
use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use cudarc::driver::{CudaFunction, CudaModule, CudaStream, DriverError};
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
    /// A tensor is stored in another type than the kernel, or the other tensors of the call, need.
    #[error("{tensor} holds {found} where {expected} was expected")]
    Element {
        /// The parameter's name.
        tensor: &'static str,
        /// The type that was expected.
        expected: Element,
        /// The type that was given.
        found: Element,
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

/// The kernels of one device, launched one after the other on one stream. A module is handed to the
/// driver when one of its kernels is first asked for, and kept.
#[derive(Debug)]
pub struct Kernels {
    stream: Arc<CudaStream>,
    capability: (i32, i32),
    shared_per_block: u32,
    multiprocessors: u32,
    loaded: Mutex<Loaded>,
}

#[derive(Debug, Default)]
struct Loaded {
    modules: HashMap<&'static str, Arc<CudaModule>>,
    functions: HashMap<&'static str, CudaFunction>,
    last: Option<&'static str>,
    noted: Option<Vec<&'static str>>,
}

impl Kernels {
    /// The kernels, on `stream`. Nothing is loaded yet.
    ///
    /// # Errors
    /// When the driver does not tell the device's compute capability, shared memory or size.
    pub fn new(stream: &Arc<CudaStream>) -> Result<Kernels, LaunchError> {
        Ok(Kernels {
            stream: stream.clone(),
            capability: stream.context().compute_capability()?,
            shared_per_block: stream
                .context()
                .attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
                .max(0) as u32,
            multiprocessors: stream
                .context()
                .attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?
                .max(1) as u32,
            loaded: Mutex::default(),
        })
    }

    /// The stream that the kernels are launched on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The device's compute capability (major, minor).
    pub fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// The most shared memory that a block may have, in bytes.
    pub(crate) fn shared_per_block(&self) -> u32 {
        self.shared_per_block
    }

    /// How many multiprocessors the device has.
    pub(crate) fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// The name of the kernel that was last asked for, which is the one last launched.
    pub fn last(&self) -> Option<&'static str> {
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.last
    }

    /// From now on notes the name of every kernel that is launched.
    pub fn start_noting(&self) {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.noted = Some(Vec::new());
    }

    /// The names noted since [`Kernels::start_noting`], each once, in the order of the first launches.
    pub fn stop_noting(&self) -> Vec<&'static str> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.noted.take().unwrap_or_default()
    }

    /// The function to launch for `kernel`.
    ///
    /// # Errors
    /// When the device is not one that the kernel was compiled for, or the driver refuses its module.
    pub fn function(&self, kernel: &'static Kernel) -> Result<CudaFunction, LaunchError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.last = Some(kernel.name);
        if let Some(noted) = &mut loaded.noted
            && !noted.contains(&kernel.name)
        {
            noted.push(kernel.name);
        }
        if let Some(function) = loaded.functions.get(kernel.name) {
            return Ok(function.clone());
        }
        let module = kernel.module;
        if !module.runs_on(self.capability) {
            return Err(LaunchError::Capability {
                kernel: kernel.name,
                needs: module.capability,
                device: self.capability,
            });
        }
        let code = match loaded.modules.get(module.source) {
            Some(code) => code.clone(),
            None => {
                let code = self
                    .stream
                    .context()
                    .load_module(Ptx::from_src(module.ptx))?;
                loaded.modules.insert(module.source, code.clone());
                code
            }
        };
        let function = code.load_function(kernel.name)?;
        loaded.functions.insert(kernel.name, function.clone());
        Ok(function)
    }

    /// The function to launch for `kernel` with `bytes` of dynamic shared memory, which a launch gets without
    /// asking only up to 48 KiB.
    pub(crate) fn function_with_shared(
        &self,
        kernel: &'static Kernel,
        bytes: u32,
    ) -> Result<CudaFunction, LaunchError> {
        let function = self.function(kernel)?;
        if bytes > 48 * 1024 {
            function.set_attribute(
                CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                bytes as i32,
            )?;
        }
        Ok(function)
    }
}

/// The kernels of one operation, by how activations are stored.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ByStorage {
    pub f32: &'static Kernel,
    pub f16: &'static Kernel,
    pub bf16: &'static Kernel,
}

impl ByStorage {
    /// The kernel for `tensor`, whose elements decide.
    pub fn of(
        &self,
        tensor: &'static str,
        element: Element,
    ) -> Result<&'static Kernel, LaunchError> {
        match element {
            Element::F32 => Ok(self.f32),
            Element::F16 => Ok(self.f16),
            Element::Bf16 => Ok(self.bf16),
            found => Err(LaunchError::Element {
                tensor,
                expected: Element::F32,
                found,
            }),
        }
    }
}

/// Launches a kernel on the stream of `$kernels`: grid, threads, then the kernel's parameters in order. It is
/// unsafe to expand: the parameters must be the kernel's, and the buffers as long as it reads and writes.
macro_rules! launch {
    ($kernels:expr, $kernel:expr, $grid:expr, $block:expr, $($parameter:expr),+ $(,)?) => {{
        let function = $kernels.function($kernel)?;
        let mut launch = $kernels.stream().launch_builder(&function);
        let config = cudarc::driver::LaunchConfig {
            grid_dim: $grid,
            block_dim: $block,
            shared_mem_bytes: 0,
        };
        launch!(@push launch, config, $($parameter),+)
    }};
    (@push $launch:ident, $config:ident, $first:expr $(, $rest:expr)*) => {{
        let parameter = $first;
        cudarc::driver::PushKernelArg::arg(&mut $launch, &parameter);
        launch!(@push $launch, $config $(, $rest)*)
    }};
    (@push $launch:ident, $config:ident) => {
        $launch.launch($config).map(|_| ())?
    };
}
pub(crate) use launch;

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

/// Checks the length of a row along which a kernel counts in 32 bits, and past its end by a stride.
pub(crate) fn check_row(parameter: &'static str, elements: u64) -> Result<(), LaunchError> {
    match elements <= 1 << 31 {
        true => Ok(()),
        false => Err(LaunchError::Parameter {
            parameter,
            found: elements,
            expected: "a row has at most 2^31 elements",
        }),
    }
}

/// The most blocks along x.
pub(crate) const GRID_X: u32 = i32::MAX as u32;
/// The most blocks along y or z.
pub(crate) const GRID_YZ: u32 = u16::MAX as u32;
