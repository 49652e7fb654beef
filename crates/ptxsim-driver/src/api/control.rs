//! What [`crate::Simulator`] calls: the simulator's settings and reports, beside the driver API.

use crate::error::CuResult;
use crate::pointer::{In, Out};
use crate::state::{LAST_FAULT, LAUNCHES, call, driver, lock, settings};
use ptxsim::{Checks, Counters, Profile};
use std::ffi::{c_char, c_void};

/// Chooses the profile by name. Fails when it is not known, or when `cuInit` has already made a
/// device of another.
#[unsafe(no_mangle)]
pub extern "C" fn ptxsimSelectProfile(name: In<c_char>) -> CuResult {
    call(|| {
        let name = name
            .text()?
            .to_str()
            .map_err(|_| CuResult::ERROR_NOT_FOUND)?;
        let profile = Profile::named(name).ok_or(CuResult::ERROR_NOT_FOUND)?;
        match driver() {
            Ok(driver) if *driver.gpu.profile() != profile => Err(CuResult::ERROR_INVALID_VALUE),
            _ => {
                settings(|settings| settings.profile = profile);
                Ok(())
            }
        }
    })
}

/// How later launches run. `checks` has one bit per field of [`Checks`], in their order.
#[unsafe(no_mangle)]
pub extern "C" fn ptxsimSetLaunch(seed: u64, checks: u32, counters: bool) -> CuResult {
    call(|| {
        settings(|settings| {
            settings.seed = seed;
            settings.checks = checks_of(checks);
            settings.counters = counters;
        });
        Ok(())
    })
}

/// How many warp instructions later launches may run.
#[unsafe(no_mangle)]
pub extern "C" fn ptxsimSetMaxInstructions(limit: u64) -> CuResult {
    call(|| {
        settings(|settings| settings.max_instructions = limit);
        Ok(())
    })
}

/// The checks as bits.
pub fn bits_of(checks: Checks) -> u32 {
    let Checks {
        uninitialized,
        shared_races,
        global_races,
        barriers,
        missing_lanes,
        async_copies,
    } = checks;
    let fields = [
        uninitialized,
        shared_races,
        global_races,
        barriers,
        missing_lanes,
        async_copies,
    ];
    fields
        .iter()
        .enumerate()
        .map(|(bit, &on)| u32::from(on) << bit)
        .sum()
}

fn checks_of(bits: u32) -> Checks {
    let on = |bit: u32| bits >> bit & 1 == 1;
    Checks {
        uninitialized: on(0),
        shared_races: on(1),
        global_races: on(2),
        barriers: on(3),
        missing_lanes: on(4),
        async_copies: on(5),
    }
}

/// Copies the text of the last fault into `buffer`, as much as it holds, and returns the text's
/// whole length.
#[unsafe(no_mangle)]
pub extern "C" fn ptxsimLastFault(buffer: Out<u8>, room: usize) -> usize {
    let text = lock(&LAST_FAULT).clone().unwrap_or_default();
    let part = &text.as_bytes()[..text.len().min(room)];
    match buffer.fill(part) {
        Ok(()) => text.len(),
        Err(_) => 0,
    }
}

/// Receives a launch: `data`, the kernel's name as bytes, its counters.
pub type Visitor = extern "C" fn(*mut c_void, *const u8, usize, *const Counters);

/// Hands every launch that was counted to `visitor`, in order, and forgets them.
#[unsafe(no_mangle)]
pub extern "C" fn ptxsimTakeLaunches(visitor: Visitor, data: *mut c_void) {
    for launch in std::mem::take(&mut *lock(&LAUNCHES)) {
        visitor(
            data,
            launch.kernel.as_ptr(),
            launch.kernel.len(),
            &launch.counters,
        );
    }
}

/// The version of this library, which the caller's has to match: counters cross as they lie in
/// memory.
#[unsafe(no_mangle)]
pub extern "C" fn ptxsimVersion(major_minor_patch: Out<[u32; 3]>) -> CuResult {
    call(|| major_minor_patch.set(crate::select::VERSION))
}
