//! Modules, their functions and variables, function attributes.

use crate::error::CuResult;
use crate::pointer::{In, Out};
use crate::state::{Driver, Function, Handle, LoadedModule, in_context, lock, report, settings};
use std::ffi::{CString, c_char};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

/// The newest PTX that the driver of a CUDA version reads.
fn newest_ptx(driver_version: i32) -> (i32, i32) {
    let (major, minor) = (driver_version / 1000, driver_version % 1000 / 10);
    match (major, minor) {
        // CUDA 12.6 brought no new PTX.
        (12, 6..) => (8, minor - 1),
        _ => (major - 4, minor),
    }
}

/// The version that a PTX text says it has.
fn version(ptx: &str) -> Option<(i32, i32)> {
    let line = ptx
        .lines()
        .find_map(|line| line.strip_prefix(".version "))?;
    let (major, minor) = line.trim().split_once('.')?;
    major.parse().ok().zip(minor.parse().ok())
}

fn load(driver: &Driver, context: Handle, ptx: &str) -> Result<Handle, (CuResult, String)> {
    let newest = newest_ptx(settings(|settings| settings.driver_version));
    if let Some(version) = version(ptx).filter(|&version| version > newest) {
        let text = format!("PTX {}.{} is newer than this driver", version.0, version.1);
        report(text.clone());
        return Err((CuResult::ERROR_UNSUPPORTED_PTX_VERSION, text));
    }
    let module = driver.gpu.load(ptx).map_err(|error| {
        let text = error.to_string();
        report(text.clone());
        (CuResult::ERROR_INVALID_PTX, text)
    })?;
    Ok(driver.modules.insert(LoadedModule {
        context,
        module,
        functions: Default::default(),
    }))
}

/// The PTX text of an image. Machine code is nothing that the simulator could run.
fn ptx(image: &In<c_char>) -> Result<&str, CuResult> {
    let magic = image.cast::<[u8; 4]>().get()?;
    let fat_binary = 0xba55_ed50_u32.to_le_bytes();
    if magic == *b"\x7fELF" || magic == fat_binary {
        return Err(CuResult::ERROR_NO_BINARY_FOR_GPU);
    }
    image
        .text()?
        .to_str()
        .map_err(|_| CuResult::ERROR_INVALID_PTX)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleLoadData(module: Out<Handle>, image: In<c_char>) -> CuResult {
    in_context(|driver, context, _| {
        module.set(load(driver, context, ptx(&image)?).map_err(|(code, _)| code)?)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleLoadDataEx(
    module: Out<Handle>,
    image: In<c_char>,
    count: u32,
    options: In<u32>,
    values: In<u64>,
) -> CuResult {
    const ERROR_LOG_BUFFER: u32 = 5;
    const ERROR_LOG_BUFFER_SIZE: u32 = 6;
    in_context(|driver, context, _| {
        let (code, log) = match load(driver, context, ptx(&image)?) {
            Ok(handle) => return module.set(handle),
            Err(error) => error,
        };
        let count = count as usize;
        let given = options.slice(count)?.iter().zip(values.slice(count)?);
        let value = |wanted| given.clone().find(|(option, _)| **option == wanted);
        if let (Some((_, &buffer)), Some((_, &room))) =
            (value(ERROR_LOG_BUFFER), value(ERROR_LOG_BUFFER_SIZE))
        {
            let mut text = log.into_bytes();
            text.truncate((room as usize).saturating_sub(1));
            text.push(0);
            if room > 0 {
                Out::at(buffer).fill(&text)?;
            }
        }
        Err(code)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleLoad(module: Out<Handle>, path: In<c_char>) -> CuResult {
    in_context(|driver, context, _| {
        let path = path
            .text()?
            .to_str()
            .map_err(|_| CuResult::ERROR_FILE_NOT_FOUND)?;
        let text = std::fs::read_to_string(path).map_err(|_| CuResult::ERROR_FILE_NOT_FOUND)?;
        module.set(load(driver, context, &text).map_err(|(code, _)| code)?)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(module: Handle) -> CuResult {
    in_context(|driver, _, _| {
        let removed = driver.modules.remove(module)?;
        for &function in lock(&removed.functions).values() {
            driver.functions.remove(function)?;
        }
        Ok(())
    })
}

fn function(
    driver: &Driver,
    handle: Handle,
    module: &LoadedModule,
    name: &str,
) -> Result<Handle, CuResult> {
    let mut functions = lock(&module.functions);
    if let Some(&function) = functions.get(name) {
        return Ok(function);
    }
    let kernel = module
        .module
        .kernel(name)
        .ok_or(CuResult::ERROR_NOT_FOUND)?;
    let function = driver.functions.insert(Function {
        module: handle,
        context: module.context,
        kernel,
        name: CString::new(name).map_err(|_| CuResult::ERROR_NOT_FOUND)?,
        max_dynamic_shared: AtomicI32::new(driver.gpu.profile().shared_per_block as i32),
    });
    functions.insert(name.to_owned(), function);
    Ok(function)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleGetFunction(
    out: Out<Handle>,
    module: Handle,
    name: In<c_char>,
) -> CuResult {
    in_context(|driver, _, _| {
        let loaded = driver.modules.get(module)?;
        let name = name
            .text()?
            .to_str()
            .map_err(|_| CuResult::ERROR_NOT_FOUND)?;
        out.set(function(driver, module, &loaded, name)?)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleGetFunctionCount(count: Out<u32>, module: Handle) -> CuResult {
    in_context(|driver, _, _| {
        count.set(driver.modules.get(module)?.module.kernels().count() as u32)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleEnumerateFunctions(
    out: Out<Handle>,
    count: u32,
    module: Handle,
) -> CuResult {
    in_context(|driver, _, _| {
        let loaded = driver.modules.get(module)?;
        let names = loaded.module.kernels().take(count as usize);
        let functions: Result<Vec<Handle>, CuResult> = names
            .map(|name| function(driver, module, &loaded, name))
            .collect();
        out.fill(&functions?)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleGetGlobal_v2(
    pointer: Out<u64>,
    bytes: Out<usize>,
    module: Handle,
    name: In<c_char>,
) -> CuResult {
    in_context(|driver, _, _| {
        let loaded = driver.modules.get(module)?;
        let name = name
            .text()?
            .to_str()
            .map_err(|_| CuResult::ERROR_NOT_FOUND)?;
        let (address, size) = loaded
            .module
            .global(name)
            .ok_or(CuResult::ERROR_NOT_FOUND)?;
        pointer.set_if_wanted(address.0);
        bytes.set_if_wanted(size as usize);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleGetLoadingMode(mode: Out<u32>) -> CuResult {
    const EAGER: u32 = 1;
    in_context(|_, _, _| mode.set(EAGER))
}

// ---- functions ----

const MAX_DYNAMIC_SHARED: i32 = 8;

fn with_function(
    function: Handle,
    body: impl FnOnce(&Driver, &Arc<Function>) -> Result<(), CuResult>,
) -> CuResult {
    in_context(|driver, _, _| body(driver, &driver.functions.get(function)?))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncGetAttribute(
    value: Out<i32>,
    attribute: i32,
    function: Handle,
) -> CuResult {
    with_function(function, |driver, function| {
        let kernel = &function.kernel;
        let (major, minor) = driver.gpu.profile().compute_capability;
        value.set(match attribute {
            0 => kernel.max_threads() as i32,
            1 => kernel.static_shared_bytes() as i32,
            3 => kernel.local_bytes() as i32,
            4 => kernel.registers() as i32,
            5 | 6 => (10 * major + minor) as i32, // PTX and binary version
            MAX_DYNAMIC_SHARED => function.max_dynamic_shared.load(Ordering::Relaxed),
            9 => -1, // PREFERRED_SHARED_MEMORY_CARVEOUT: the driver's choice
            2 | 7 | 10..=16 => 0,
            _ => return Err(CuResult::ERROR_INVALID_VALUE),
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetAttribute(function: Handle, attribute: i32, value: i32) -> CuResult {
    with_function(function, |driver, function| match attribute {
        MAX_DYNAMIC_SHARED => {
            let limit = driver.gpu.profile().shared_per_block_optin;
            let available = limit.saturating_sub(function.kernel.static_shared_bytes()) as i32;
            if !(0..=available).contains(&value) {
                return Err(CuResult::ERROR_INVALID_VALUE);
            }
            function.max_dynamic_shared.store(value, Ordering::Relaxed);
            Ok(())
        }
        // Hints about caches and cluster scheduling, and the leave for clusters above 8 blocks.
        9 | 14 | 15 => Ok(()),
        _ => Err(CuResult::ERROR_INVALID_VALUE),
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetCacheConfig(function: Handle, _config: u32) -> CuResult {
    with_function(function, |_, _| Ok(()))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncGetModule(module: Out<Handle>, function: Handle) -> CuResult {
    with_function(function, |_, function| module.set(function.module))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncGetName(name: Out<*const c_char>, function: Handle) -> CuResult {
    // The text lives as long as the function, which its table holds.
    with_function(function, |_, function| name.set(function.name.as_ptr()))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncGetParamInfo(
    function: Handle,
    index: usize,
    offset: Out<usize>,
    size: Out<usize>,
) -> CuResult {
    with_function(function, |_, function| {
        let param = function
            .kernel
            .params()
            .get(index)
            .ok_or(CuResult::ERROR_INVALID_VALUE)?;
        offset.set(param.offset as usize)?;
        size.set_if_wanted(param.size as usize);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncIsLoaded(state: Out<u32>, function: Handle) -> CuResult {
    const LOADED: u32 = 1;
    with_function(function, |_, _| state.set(LOADED))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncLoad(function: Handle) -> CuResult {
    with_function(function, |_, _| Ok(()))
}
