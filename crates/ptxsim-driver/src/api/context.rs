//! Contexts: the primary one, others, and the stack of current ones of each thread.

use super::device::with_device;
use crate::error::CuResult;
use crate::pointer::{In, Out};
use crate::state::{CURRENT, Handle, driver, in_context, lock, with_driver};

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRetain(context: Out<Handle>, device: i32) -> CuResult {
    with_device(device, |_| {
        let driver = driver()?;
        let mut primary = lock(&driver.primary);
        let (handle, retained) = primary.get_or_insert_with(|| (driver.create_context(0), 0));
        *retained += 1;
        context.set(*handle)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(device: i32) -> CuResult {
    with_device(device, |_| {
        let driver = driver()?;
        let mut primary = lock(&driver.primary);
        let (handle, retained) = primary.as_mut().ok_or(CuResult::ERROR_INVALID_CONTEXT)?;
        *retained -= 1;
        if *retained == 0 {
            driver.destroy_context(*handle)?;
            *primary = None;
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxReset_v2(device: i32) -> CuResult {
    with_device(device, |_| {
        let driver = driver()?;
        match lock(&driver.primary).take() {
            Some((handle, _)) => driver.destroy_context(handle),
            None => Ok(()),
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxGetState(
    device: i32,
    flags: Out<u32>,
    active: Out<i32>,
) -> CuResult {
    with_device(device, |_| {
        flags.set(0)?;
        active.set(lock(&driver()?.primary).is_some().into())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxCreate_v4(
    context: Out<Handle>,
    _params: In<u8>,
    flags: u32,
    device: i32,
) -> CuResult {
    with_device(device, |_| {
        let handle = driver()?.create_context(flags);
        CURRENT.with_borrow_mut(|stack| stack.push(handle));
        context.set(handle)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxDestroy_v2(context: Handle) -> CuResult {
    with_driver(|driver| {
        CURRENT.with_borrow_mut(|stack| {
            if stack.last() == Some(&context) {
                stack.pop();
            }
        });
        driver.destroy_context(context)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetCurrent(context: Out<Handle>) -> CuResult {
    with_driver(|_| context.set(CURRENT.with_borrow(|stack| stack.last().copied().unwrap_or(0))))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: Handle) -> CuResult {
    with_driver(|driver| {
        if context != 0 {
            driver
                .contexts
                .get(context)
                .map_err(|_| CuResult::ERROR_INVALID_CONTEXT)?;
        }
        CURRENT.with_borrow_mut(|stack| {
            stack.pop();
            if context != 0 {
                stack.push(context);
            }
        });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPushCurrent_v2(context: Handle) -> CuResult {
    with_driver(|driver| {
        driver
            .contexts
            .get(context)
            .map_err(|_| CuResult::ERROR_INVALID_CONTEXT)?;
        CURRENT.with_borrow_mut(|stack| stack.push(context));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPopCurrent_v2(context: Out<Handle>) -> CuResult {
    with_driver(|_| match CURRENT.with_borrow_mut(Vec::pop) {
        Some(handle) => {
            context.set_if_wanted(handle);
            Ok(())
        }
        None => Err(CuResult::ERROR_INVALID_CONTEXT),
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetDevice(device: Out<i32>) -> CuResult {
    in_context(|_, _, _| device.set(0))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetDevice_v2(device: Out<i32>, context: Handle) -> CuResult {
    with_driver(|driver| {
        if context != 0 {
            driver
                .contexts
                .get(context)
                .map_err(|_| CuResult::ERROR_INVALID_CONTEXT)?;
        }
        device.set(0)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetFlags(flags: Out<u32>) -> CuResult {
    in_context(|_, _, context| flags.set(context.flags))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetApiVersion(context: Handle, version: Out<u32>) -> CuResult {
    with_driver(|driver| {
        if context != 0 {
            driver
                .contexts
                .get(context)
                .map_err(|_| CuResult::ERROR_INVALID_CONTEXT)?;
        }
        version.set(13000)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetStreamPriorityRange(least: Out<i32>, greatest: Out<i32>) -> CuResult {
    in_context(|_, _, _| {
        least.set_if_wanted(0);
        greatest.set_if_wanted(0);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> CuResult {
    in_context(|driver, _, _| driver.captures.refuse_unsafe())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize_v2(context: Handle) -> CuResult {
    with_driver(|driver| {
        let found = driver.contexts.get(context);
        let found = found.map_err(|_| CuResult::ERROR_INVALID_CONTEXT)?;
        match *lock(&found.fault) {
            Some(code) => Err(code),
            None => Ok(()),
        }
    })
}
