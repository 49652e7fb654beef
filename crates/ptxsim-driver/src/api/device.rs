//! Initialization, the device and its attributes, error texts.

use crate::error::CuResult;
use crate::pointer::{In, Out};
use crate::state::{call, initialize, settings, with_driver};
use ptxsim::Profile;
use std::ffi::c_char;

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(flags: u32) -> CuResult {
    call(|| {
        if flags != 0 {
            return Err(CuResult::ERROR_INVALID_VALUE);
        }
        initialize();
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDriverGetVersion(version: Out<i32>) -> CuResult {
    call(|| version.set(settings(|settings| settings.driver_version)))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorName(code: CuResult, name: Out<*const c_char>) -> CuResult {
    call(|| match code.describe() {
        Some((text, _)) => name.set(text.as_ptr()),
        None => Err(CuResult::ERROR_INVALID_VALUE),
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorString(code: CuResult, string: Out<*const c_char>) -> CuResult {
    call(|| match code.describe() {
        Some((_, text)) => string.set(text.as_ptr()),
        None => Err(CuResult::ERROR_INVALID_VALUE),
    })
}

/// The body of a function about device 0, the only one.
pub fn with_device(device: i32, body: impl FnOnce(&Profile) -> Result<(), CuResult>) -> CuResult {
    with_driver(|driver| {
        if device != 0 {
            return Err(CuResult::ERROR_INVALID_DEVICE);
        }
        body(driver.gpu.profile())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetCount(count: Out<i32>) -> CuResult {
    with_driver(|_| count.set(1))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGet(device: Out<i32>, ordinal: i32) -> CuResult {
    with_device(ordinal, |_| device.set(0))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetName(name: Out<u8>, length: i32, device: i32) -> CuResult {
    with_device(device, |profile| {
        let room = usize::try_from(length).unwrap_or(0).saturating_sub(1);
        let mut text = format!("{} (simulated)", profile.name).into_bytes();
        text.truncate(room);
        text.push(0);
        name.fill(&text)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetUuid_v2(uuid: Out<[u8; 16]>, device: i32) -> CuResult {
    with_device(device, |_| uuid.set(*b"ptxsim-device-00"))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetPCIBusId(id: Out<u8>, length: i32, device: i32) -> CuResult {
    with_device(device, |_| {
        let text = b"0000:00:00.0\0";
        if usize::try_from(length).unwrap_or(0) < text.len() {
            return Err(CuResult::ERROR_INVALID_VALUE);
        }
        id.fill(text)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetByPCIBusId(device: Out<i32>, id: In<c_char>) -> CuResult {
    with_driver(|_| match id.text()?.to_bytes() {
        b"0000:00:00.0" => device.set(0),
        _ => Err(CuResult::ERROR_INVALID_DEVICE),
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: i32) -> CuResult {
    with_device(device, |profile| bytes.set(profile.memory_bytes as usize))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceComputeCapability(
    major: Out<i32>,
    minor: Out<i32>,
    device: i32,
) -> CuResult {
    with_device(device, |profile| {
        major.set(profile.compute_capability.0 as i32)?;
        minor.set(profile.compute_capability.1 as i32)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetAttribute(value: Out<i32>, attribute: i32, device: i32) -> CuResult {
    with_device(device, |profile| {
        match self::attribute(profile, attribute) {
            Some(found) => value.set(found),
            None => Err(CuResult::ERROR_INVALID_VALUE),
        }
    })
}

/// A `CUdevice_attribute`; those that name what is not simulated (textures, pools, managed
/// memory, peers) are 0.
fn attribute(profile: &Profile, attribute: i32) -> Option<i32> {
    let clusters = i32::from(profile.compute_capability.0 >= 9);
    Some(match attribute {
        1..=3 => 1024,                               // threads of a block, along x, y
        4 => 64,                                     // along z
        5 => i32::MAX,                               // blocks along x
        6 | 7 => 65535,                              // along y, z
        8 => profile.shared_per_block as i32,        // MAX_SHARED_MEMORY_PER_BLOCK
        9 => 65536,                                  // TOTAL_CONSTANT_MEMORY
        10 => 32,                                    // WARP_SIZE
        11 => i32::MAX,                              // MAX_PITCH
        12 | 82 => profile.registers_per_sm as i32,  // registers of a block, of an SM
        13 => profile.clock_khz as i32,              // CLOCK_RATE
        14 | 30 => 512,                              // texture and surface alignment
        16 => profile.sm_count as i32,               // MULTIPROCESSOR_COUNT
        31 => 1,                                     // CONCURRENT_KERNELS
        36 => profile.memory_clock_khz as i32,       // MEMORY_CLOCK_RATE
        37 => profile.memory_bus_bits as i32,        // GLOBAL_MEMORY_BUS_WIDTH
        38 => profile.l2_bytes as i32,               // L2_CACHE_SIZE
        39 => profile.threads_per_sm as i32,         // MAX_THREADS_PER_MULTIPROCESSOR
        40 => 1,                                     // ASYNC_ENGINE_COUNT
        41 => 1,                                     // UNIFIED_ADDRESSING
        51 => 32,                                    // TEXTURE_PITCH_ALIGNMENT
        75 => profile.compute_capability.0 as i32,   // COMPUTE_CAPABILITY_MAJOR
        76 => profile.compute_capability.1 as i32,   // COMPUTE_CAPABILITY_MINOR
        79 | 80 => 1,                                // global and local L1 cache
        81 => profile.shared_per_sm as i32,          // shared memory of an SM
        97 => profile.shared_per_block_optin as i32, // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        99 => 1,                                     // HOST_REGISTER_SUPPORTED
        106 => profile.blocks_per_sm as i32,         // MAX_BLOCKS_PER_MULTIPROCESSOR
        111 => 1024,                                 // RESERVED_SHARED_MEMORY_PER_BLOCK
        120 => clusters,                             // CLUSTER_LAUNCH
        127 => clusters,                             // TENSOR_MAP_ACCESS_SUPPORTED
        0..=199 => 0,
        _ => return None,
    })
}
