//! Device memory, pinned host memory, copies and fills.

use crate::error::CuResult;
use crate::pointer::{In, Out};
use crate::state::{Context, Driver, Handle, in_context, lock};
use ptxsim::DevicePtr;
use std::alloc::{Layout, alloc_zeroed, dealloc};

const PAGE: usize = 4096;

#[unsafe(no_mangle)]
pub extern "C" fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) -> CuResult {
    in_context(|driver, _, _| {
        let info = driver.gpu.memory_info();
        free.set(info.free as usize)?;
        total.set(info.total as usize)
    })
}

fn allocate(driver: &Driver, context: &Context, bytes: u64) -> Result<u64, CuResult> {
    driver.captures.refuse_unsafe()?;
    if bytes == 0 {
        return Err(CuResult::ERROR_INVALID_VALUE);
    }
    let DevicePtr(address) = driver.gpu.alloc(bytes)?;
    lock(&context.allocations).insert(address, bytes);
    Ok(address)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAlloc_v2(pointer: Out<u64>, bytes: usize) -> CuResult {
    in_context(|driver, _, context| pointer.set(allocate(driver, context, bytes as u64)?))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAllocPitch_v2(
    pointer: Out<u64>,
    pitch: Out<usize>,
    width: usize,
    height: usize,
    _element_bytes: u32,
) -> CuResult {
    in_context(|driver, _, context| {
        let row = width.next_multiple_of(512);
        let bytes = row
            .checked_mul(height)
            .ok_or(CuResult::ERROR_INVALID_VALUE)?;
        pitch.set(row)?;
        pointer.set(allocate(driver, context, bytes as u64)?)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(pointer: u64) -> CuResult {
    in_context(|driver, _, context| {
        if pointer == 0 {
            return Ok(());
        }
        driver.captures.refuse_unsafe()?;
        driver.gpu.free(DevicePtr(pointer))?;
        lock(&context.allocations).remove(&pointer);
        Ok(())
    })
}

/// The allocation of `context` that `address` lies in: its start and size.
fn range(context: &Context, address: u64) -> Result<(u64, u64), CuResult> {
    let allocations = lock(&context.allocations);
    let below = allocations.range(..=address).next_back();
    match below {
        Some((&start, &bytes)) if address - start < bytes => Ok((start, bytes)),
        _ => Err(CuResult::ERROR_NOT_FOUND),
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemGetAddressRange_v2(
    base: Out<u64>,
    bytes: Out<usize>,
    pointer: u64,
) -> CuResult {
    in_context(|_, _, context| {
        let (start, size) = range(context, pointer)?;
        base.set_if_wanted(start);
        bytes.set_if_wanted(size as usize);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuPointerGetAttribute(data: Out<u8>, attribute: i32, pointer: u64) -> CuResult {
    in_context(|driver, handle, context| {
        let device = driver.is_device(pointer);
        let pinned = lock(&driver.host)
            .range(..=pointer)
            .next_back()
            .is_some_and(|(&start, &(bytes, _))| pointer - start < bytes as u64);
        if !device && !pinned {
            return Err(CuResult::ERROR_INVALID_VALUE);
        }
        match attribute {
            1 => data.cast::<Handle>().set(handle),
            2 => data.cast::<u32>().set(if device { 2 } else { 1 }), // MEMORY_TYPE
            3 if device => data.cast::<u64>().set(pointer),          // DEVICE_POINTER
            4 if pinned => data.cast::<u64>().set(pointer),          // HOST_POINTER
            8 => data.cast::<u8>().set(0),                           // IS_MANAGED
            9 => data.cast::<i32>().set(0),                          // DEVICE_ORDINAL
            11 => data.cast::<u64>().set(range(context, pointer)?.0),
            12 => data
                .cast::<usize>()
                .set(range(context, pointer)?.1 as usize),
            _ => Err(CuResult::ERROR_INVALID_VALUE),
        }
    })
}

// ---- pinned host memory ----

fn host_layout(bytes: usize) -> Result<Layout, CuResult> {
    Layout::from_size_align(bytes, PAGE).map_err(|_| CuResult::ERROR_INVALID_VALUE)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostAlloc(pointer: Out<u64>, bytes: usize, _flags: u32) -> CuResult {
    in_context(|driver, _, _| {
        if bytes == 0 {
            return Err(CuResult::ERROR_INVALID_VALUE);
        }
        driver.captures.refuse_unsafe()?;
        // SAFETY: the layout's size is not 0.
        let address = unsafe { alloc_zeroed(host_layout(bytes)?) } as u64;
        if address == 0 {
            return Err(CuResult::ERROR_OUT_OF_MEMORY);
        }
        lock(&driver.host).insert(address, (bytes, true));
        pointer.set(address)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAllocHost_v2(pointer: Out<u64>, bytes: usize) -> CuResult {
    cuMemHostAlloc(pointer, bytes, 0)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeHost(pointer: u64) -> CuResult {
    in_context(|driver, _, _| {
        driver.captures.refuse_unsafe()?;
        let mut host = lock(&driver.host);
        match host.get(&pointer) {
            Some(&(bytes, true)) => {
                host.remove(&pointer);
                // SAFETY: cuMemHostAlloc allocated it with this layout, and it was still listed.
                unsafe { dealloc(pointer as *mut u8, host_layout(bytes)?) };
                Ok(())
            }
            _ => Err(CuResult::ERROR_INVALID_VALUE),
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostRegister_v2(pointer: u64, bytes: usize, _flags: u32) -> CuResult {
    in_context(|driver, _, _| {
        if pointer == 0 || bytes == 0 {
            return Err(CuResult::ERROR_INVALID_VALUE);
        }
        let mut host = lock(&driver.host);
        if host.contains_key(&pointer) {
            return Err(CuResult::ERROR_HOST_MEMORY_ALREADY_REGISTERED);
        }
        host.insert(pointer, (bytes, false));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostUnregister(pointer: u64) -> CuResult {
    in_context(|driver, _, _| {
        let mut host = lock(&driver.host);
        match host.get(&pointer) {
            Some((_, false)) => {
                host.remove(&pointer);
                Ok(())
            }
            _ => Err(CuResult::ERROR_HOST_MEMORY_NOT_REGISTERED),
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostGetFlags(flags: Out<u32>, pointer: u64) -> CuResult {
    in_context(
        |driver, _, _| match lock(&driver.host).contains_key(&pointer) {
            true => flags.set(0),
            false => Err(CuResult::ERROR_INVALID_VALUE),
        },
    )
}

// ---- copies ----

/// Copies between any two addresses, each the device's or the host's.
fn copy(driver: &Driver, to: u64, from: u64, bytes: usize) -> Result<(), CuResult> {
    match (driver.is_device(to), driver.is_device(from)) {
        (true, true) => driver
            .gpu
            .copy(DevicePtr(to), DevicePtr(from), bytes as u64)?,
        (true, false) => driver
            .gpu
            .write(DevicePtr(to), In::at(from).slice(bytes)?)?,
        (false, true) => driver
            .gpu
            .read(DevicePtr(from), Out::at(to).bytes(bytes)?)?,
        (false, false) => {
            let data = In::<u8>::at(from).slice(bytes)?.to_vec();
            Out::at(to).bytes(bytes)?.copy_from_slice(&data);
        }
    }
    Ok(())
}

/// Which side of a copy is said to be the device's.
#[derive(Clone, Copy)]
enum Sides {
    ToDevice,
    ToHost,
    WithinDevice,
    /// By their addresses.
    Any,
}

fn submit_copy(sides: Sides, to: u64, from: u64, bytes: usize, stream: Handle) -> CuResult {
    in_context(|driver, _, context| {
        driver.submit(context, stream, move |driver, _| {
            let gpu = &driver.gpu;
            match sides {
                Sides::ToDevice => gpu.write(DevicePtr(to), In::at(from).slice(bytes)?)?,
                Sides::ToHost => gpu.read(DevicePtr(from), Out::at(to).bytes(bytes)?)?,
                Sides::WithinDevice => gpu.copy(DevicePtr(to), DevicePtr(from), bytes as u64)?,
                Sides::Any => copy(driver, to, from, bytes)?,
            }
            Ok(())
        })
    })
}

/// A copy or fill that returns when it is done, which it would not during a capture.
fn at_once(act: impl FnOnce() -> CuResult) -> CuResult {
    match in_context(|driver, _, _| driver.captures.refuse_unsafe()) {
        CuResult::SUCCESS => act(),
        refused => refused,
    }
}

/// The functions that copy in one direction: at once, and in a stream.
macro_rules! copies {
    ($($sides:ident, $plain:ident, $plain_async:ident;)*) => {$(
        #[unsafe(no_mangle)]
        pub extern "C" fn $plain(to: u64, from: u64, bytes: usize) -> CuResult {
            at_once(|| $plain_async(to, from, bytes, 0))
        }

        #[unsafe(no_mangle)]
        pub extern "C" fn $plain_async(
            to: u64,
            from: u64,
            bytes: usize,
            stream: Handle,
        ) -> CuResult {
            submit_copy(Sides::$sides, to, from, bytes, stream)
        }
    )*};
}

copies! {
    ToDevice, cuMemcpyHtoD_v2, cuMemcpyHtoDAsync_v2;
    ToHost, cuMemcpyDtoH_v2, cuMemcpyDtoHAsync_v2;
    WithinDevice, cuMemcpyDtoD_v2, cuMemcpyDtoDAsync_v2;
    Any, cuMemcpy, cuMemcpyAsync;
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyPeer(
    to: u64,
    _to_context: Handle,
    from: u64,
    _from_context: Handle,
    bytes: usize,
) -> CuResult {
    cuMemcpyDtoD_v2(to, from, bytes)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyPeerAsync(
    to: u64,
    _to_context: Handle,
    from: u64,
    _from_context: Handle,
    bytes: usize,
    stream: Handle,
) -> CuResult {
    cuMemcpyDtoDAsync_v2(to, from, bytes, stream)
}

/// One side of `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Plane {
    x_in_bytes: usize,
    y: usize,
    memory_type: u32,
    host: u64,
    device: u64,
    array: u64,
    pitch: usize,
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Copy2D {
    from: Plane,
    to: Plane,
    width_in_bytes: usize,
    height: usize,
}

impl Plane {
    /// The address of the first byte of a row of the copy.
    fn row(&self, row: usize, width: usize) -> Result<u64, CuResult> {
        let base = match self.memory_type {
            1 => self.host,
            2 | 4 => self.device, // device, unified
            _ => return Err(CuResult::ERROR_NOT_SUPPORTED),
        };
        let pitch = if self.pitch == 0 { width } else { self.pitch };
        let offset = (self.y + row)
            .checked_mul(pitch)
            .and_then(|y| y.checked_add(self.x_in_bytes));
        Ok(base.wrapping_add(offset.ok_or(CuResult::ERROR_INVALID_VALUE)? as u64))
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpy2D_v2(parameters: In<Copy2D>) -> CuResult {
    at_once(|| cuMemcpy2DAsync_v2(parameters, 0))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpy2DUnaligned_v2(parameters: In<Copy2D>) -> CuResult {
    at_once(|| cuMemcpy2DAsync_v2(parameters, 0))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpy2DAsync_v2(parameters: In<Copy2D>, stream: Handle) -> CuResult {
    in_context(|driver, _, context| {
        let Copy2D {
            from,
            to,
            width_in_bytes: width,
            height,
        } = parameters.get()?;
        driver.submit(context, stream, move |driver, _| {
            (0..height)
                .try_for_each(|row| copy(driver, to.row(row, width)?, from.row(row, width)?, width))
        })
    })
}

// ---- fills ----

/// The functions that set memory to a value of one width: rows of a plane, or one run.
macro_rules! fills {
    ($value:ty, $fill:ident, $plain:ident, $plain_async:ident, $rows:ident, $rows_async:ident) => {
        #[unsafe(no_mangle)]
        pub extern "C" fn $plain(to: u64, value: $value, count: usize) -> CuResult {
            at_once(|| $plain_async(to, value, count, 0))
        }

        #[unsafe(no_mangle)]
        pub extern "C" fn $plain_async(
            to: u64,
            value: $value,
            count: usize,
            stream: Handle,
        ) -> CuResult {
            $rows_async(to, 0, value, count, 1, stream)
        }

        #[unsafe(no_mangle)]
        pub extern "C" fn $rows(
            to: u64,
            pitch: usize,
            value: $value,
            width: usize,
            height: usize,
        ) -> CuResult {
            at_once(|| $rows_async(to, pitch, value, width, height, 0))
        }

        #[unsafe(no_mangle)]
        pub extern "C" fn $rows_async(
            to: u64,
            pitch: usize,
            value: $value,
            width: usize,
            height: usize,
            stream: Handle,
        ) -> CuResult {
            in_context(|driver, _, context| {
                driver.submit(context, stream, move |driver, _| {
                    (0..height as u64).try_for_each(|row| {
                        let start = DevicePtr(to.wrapping_add(row.wrapping_mul(pitch as u64)));
                        Ok(driver.gpu.$fill(start, value, width as u64)?)
                    })
                })
            })
        }
    };
}

fills!(
    u8,
    fill8,
    cuMemsetD8_v2,
    cuMemsetD8Async,
    cuMemsetD2D8_v2,
    cuMemsetD2D8Async
);
fills!(
    u16,
    fill16,
    cuMemsetD16_v2,
    cuMemsetD16Async,
    cuMemsetD2D16_v2,
    cuMemsetD2D16Async
);
fills!(
    u32,
    fill32,
    cuMemsetD32_v2,
    cuMemsetD32Async,
    cuMemsetD2D32_v2,
    cuMemsetD2D32Async
);
