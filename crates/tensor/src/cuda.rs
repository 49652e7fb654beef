//! A CUDA device: its one stream, its memory, its kernels.

pub(crate) mod graph;

use crate::{
    DType, Error, MemoryUse, Result,
    pool::{self, LINE, Pool, Source},
    tensor::Largest,
};
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr, DriverError, result,
    sys::{self, cudaError_enum as Code},
};
use fuselora_kernels::{Element, Kernels, LaunchError, Operand, OperandMut, modules};
use graph::Capturing;
use std::{
    fmt,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Memory on a CUDA device. All work is ordered by the device's one stream, so that a buffer may be dropped, and its
/// memory handed out again, while work on it is still to be done.
pub(crate) type Buffer = pool::Buffer<DeviceMemory>;

pub(crate) struct Cuda {
    ordinal: usize,
    kernels: Kernels,
    pool: Arc<Pool<DeviceMemory>>,
    work: Mutex<Work>,
}

/// What the device was given to do.
#[derive(Default)]
struct Work {
    /// While it is captured instead of started.
    capturing: Option<Capturing>,
    /// The kernels of the graph that was launched last, where that was after the last kernel of its own.
    graph: Option<Arc<[&'static str]>>,
}

/// The number of devices, 0 where there is no driver.
pub(crate) fn count() -> usize {
    if !driver_is_present() {
        return 0;
    }
    let counted = result::init().and_then(|()| result::device::get_count());
    counted.ok().and_then(|n| n.try_into().ok()).unwrap_or(0)
}

fn driver_is_present() -> bool {
    // SAFETY: it only asks the loader for the driver's library.
    unsafe { sys::is_culib_present() }
}

impl Cuda {
    pub fn open(ordinal: usize) -> Result<Cuda> {
        if !driver_is_present() {
            return Err(Error::NoDriver);
        }
        let count = count();
        if ordinal >= count {
            return Err(Error::NoDevice { ordinal, count });
        }
        let context = CudaContext::new(ordinal).map_err(driver_error)?;
        // SAFETY: cudarc's events order work between streams, and this device has one.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(driver_error)?;
        let kernels = Kernels::new(&stream).map_err(|error| Error::Cuda(error.to_string()))?;
        check_kernels(&kernels)?;
        let name = format!("cuda:{ordinal}");
        Ok(Cuda {
            ordinal,
            kernels,
            pool: Pool::new(DeviceMemory { stream, name }),
            work: Mutex::default(),
        })
    }

    pub fn pool(&self) -> &Arc<Pool<DeviceMemory>> {
        &self.pool
    }

    /// Runs a launcher; its error names the kernel.
    pub fn launch(
        &self,
        launcher: impl FnOnce(&Kernels) -> std::result::Result<(), LaunchError>,
    ) -> Result<()> {
        self.work().graph = None;
        launcher(&self.kernels).map_err(|error| match error {
            LaunchError::Driver(error) => self.fault(error),
            refused => Error::Cuda(refused.to_string()),
        })
    }

    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses what only happens once, where it would be captured to happen again.
    fn refuse_capture(&self, what: &str) -> Result<()> {
        match self.work().capturing {
            Some(_) => Err(Error::NotCaptured(what.into())),
            None => Ok(()),
        }
    }

    /// Copies `bytes` to the start of `buffer`, which is at least as large.
    pub fn upload(&self, bytes: &[u8], buffer: &mut Buffer) -> Result<()> {
        self.refuse_capture("values are copied from the host")?;
        match buffer.block_mut() {
            Some(block) if !bytes.is_empty() => {
                let mut target = block.slice_mut(..bytes.len());
                let copied = self.stream().memcpy_htod(bytes, &mut target);
                copied.map_err(|error| self.fault(error))
            }
            _ => Ok(()),
        }
    }

    /// Copies all of `buffer` to `bytes`, which is as large, when the work before is done.
    pub fn download(&self, buffer: &Buffer, bytes: &mut [u8]) -> Result<()> {
        self.refuse_capture("the host reads values")?;
        match buffer.block() {
            Some(block) if !bytes.is_empty() => {
                let copied = (self.stream()).memcpy_dtoh(&block.slice(..bytes.len()), bytes);
                copied.map_err(|error| self.fault(error))?;
                self.synchronize()
            }
            _ => Ok(()),
        }
    }

    /// Copies the bytes `range` of `source` into `target` from byte `offset` on, where they fit.
    pub fn copy(
        &self,
        source: &Buffer,
        range: Range<usize>,
        target: &mut Buffer,
        offset: usize,
    ) -> Result<()> {
        source.note_use();
        target.note_use();
        let len = range.len();
        match (source.block(), target.block_mut()) {
            (Some(source), Some(target)) if len > 0 => {
                let mut target = target.slice_mut(offset..offset + len);
                let copied = self.stream().memcpy_dtod(&source.slice(range), &mut target);
                copied.map_err(|error| self.fault(error))
            }
            _ => Ok(()),
        }
    }

    pub fn fill_zero(&self, buffer: &mut Buffer) -> Result<()> {
        buffer.note_use();
        let len = buffer.len();
        match buffer.block_mut() {
            Some(block) if len > 0 => {
                let filled = self.stream().memset_zeros(&mut block.slice_mut(..len));
                filled.map_err(|error| self.fault(error))
            }
            _ => Ok(()),
        }
    }

    pub fn synchronize(&self) -> Result<()> {
        self.refuse_capture("the host waits for the device")?;
        let done = self.stream().synchronize();
        done.map_err(|error| self.fault(error))
    }

    fn stream(&self) -> &Arc<CudaStream> {
        self.kernels.stream()
    }

    /// An error that the driver reports now, but whose cause may be any kernel that was launched before.
    fn fault(&self, error: DriverError) -> Error {
        let last = match (&self.work().graph, self.kernels.last()) {
            (Some(kernels), _) => format!(
                "; the work before was a captured graph of {} (with CUDA_LAUNCH_BLOCKING=1 nothing is captured, and the \
                 one at fault is named)",
                kernels.join(", ")
            ),
            (None, Some(kernel)) => format!(
                "; the last kernel before was {kernel} (with CUDA_LAUNCH_BLOCKING=1 it is the one at fault)"
            ),
            (None, None) => String::new(),
        };
        Error::Cuda(format!("{self}: {}{last}", describe(error)))
    }
}

impl fmt::Display for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda:{}", self.ordinal)
    }
}

/// Whether device and driver take the kernels, by loading one.
fn check_kernels(kernels: &Kernels) -> Result<()> {
    let Some(kernel) = modules::KERNELS.iter().find(|k| !k.module.exact) else {
        return Ok(());
    };
    kernels
        .function(kernel)
        .map(drop)
        .map_err(|error| match error {
            LaunchError::Driver(DriverError(Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION)) => {
                let mut version = 0;
                // SAFETY: the pointer is valid.
                let _ = unsafe { sys::cuDriverGetVersion(&mut version) };
                Error::OldDriver {
                    supports: format!("{}.{}", version / 1000, version % 1000 / 10),
                    ptx: kernel.module.ptx_version().into(),
                }
            }
            LaunchError::Driver(error) => driver_error(error),
            refused => Error::Cuda(refused.to_string()),
        })
}

fn driver_error(error: DriverError) -> Error {
    Error::Cuda(describe(error))
}

fn describe(error: DriverError) -> String {
    let text = error.error_string().ok();
    let text = text.and_then(|text| text.to_str().ok());
    match text {
        Some(text) => format!("the CUDA driver reports {text} ({:?})", error.0),
        None => format!("the CUDA driver reports {:?}", error.0),
    }
}

/// The memory of one CUDA device, in the order of its stream.
pub(crate) struct DeviceMemory {
    stream: Arc<CudaStream>,
    name: String,
}

impl Source for DeviceMemory {
    type Block = CudaSlice<u8>;

    fn allocate(&self, lines: usize) -> Result<Option<CudaSlice<u8>>> {
        // SAFETY: bytes may have any value, and a tensor's values are unspecified until they are written.
        match unsafe { self.stream.alloc(lines.saturating_mul(LINE)) } {
            Ok(block) => Ok(Some(block)),
            Err(DriverError(Code::CUDA_ERROR_OUT_OF_MEMORY)) => Ok(None),
            Err(error) => Err(driver_error(error)),
        }
    }

    fn exhausted(&self, bytes: usize, memory: &MemoryUse) -> Error {
        Error::OutOfMemory {
            bytes,
            device: self.name.clone(),
            held: memory.held,
        }
    }
}

/// The largest of the indices that a tensor holds, known to the graphs that read it too.
#[derive(Clone, Default)]
pub(crate) struct LargestIndex(Arc<Mutex<Option<Largest>>>);

impl LargestIndex {
    pub fn get(&self) -> Option<Largest> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set(&self, largest: Option<Largest>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = largest;
    }
}

/// Kernels count so far along an extent: indices in 32 bits go past it by a stride.
const LARGEST_EXTENT: usize = 1 << 31;

/// The extents of a tensor, or of what it is called with, as kernels take them.
pub(crate) fn extents<const N: usize>(name: &str, extents: [usize; N]) -> Result<[u32; N]> {
    match extents.iter().find(|&&extent| extent > LARGEST_EXTENT) {
        Some(extent) => Err(Error::Argument(format!(
            "{name}: an extent of {extent} is more than kernels count, {LARGEST_EXTENT}"
        ))),
        None => Ok(extents.map(|extent| extent as u32)),
    }
}

fn element(dtype: DType) -> Element {
    match dtype {
        DType::F32 => Element::F32,
        DType::F16 => Element::F16,
        DType::BF16 => Element::Bf16,
        DType::U32 => Element::U32,
        DType::U8 => Element::U8,
    }
}

fn address(block: Option<&CudaSlice<u8>>) -> u64 {
    block.map_or(0, |block| block.device_ptr(block.stream()).0)
}

/// The elements of a buffer, for a kernel that reads them.
pub(crate) fn operand(buffer: &Buffer, dtype: DType) -> Operand<'_> {
    buffer.note_use();
    let len = buffer.len() / dtype.size_in_bytes();
    // SAFETY: the block is one allocation; it is borrowed for the operand's life, and is freed or handed out again in
    // the order of the stream.
    unsafe { Operand::from_raw(address(buffer.block()), len, element(dtype)) }
}

/// The elements of a buffer, for a kernel that writes them.
pub(crate) fn operand_mut(buffer: &mut Buffer, dtype: DType) -> OperandMut<'_> {
    buffer.note_use();
    let len = buffer.len() / dtype.size_in_bytes();
    // SAFETY: as above, and the buffer is borrowed mutably.
    unsafe { OperandMut::from_raw(address(buffer.block()), len, element(dtype)) }
}

/// No elements: what a tensor on another device has for a kernel.
pub(crate) fn no_operand(dtype: DType) -> Operand<'static> {
    // SAFETY: there is nothing to read.
    unsafe { Operand::from_raw(0, 0, element(dtype)) }
}

/// No elements, to write.
pub(crate) fn no_operand_mut(dtype: DType) -> OperandMut<'static> {
    // SAFETY: there is nothing to write.
    unsafe { OperandMut::from_raw(0, 0, element(dtype)) }
}
