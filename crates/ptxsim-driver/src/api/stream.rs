//! Streams and events. Work is done before a call returns, so there is never anything to wait for.

use crate::capture::Mark;
use crate::error::CuResult;
use crate::pointer::Out;
use crate::state::{Event, Handle, Stream, in_context, lock};
use std::ffi::c_void;
use std::time::Instant;

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamCreate(stream: Out<Handle>, flags: u32) -> CuResult {
    cuStreamCreateWithPriority(stream, flags, 0)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamCreateWithPriority(
    stream: Out<Handle>,
    flags: u32,
    priority: i32,
) -> CuResult {
    in_context(|driver, context, _| {
        if flags > 1 {
            return Err(CuResult::ERROR_INVALID_VALUE);
        }
        stream.set(driver.streams.insert(Stream {
            context,
            flags,
            priority,
        }))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(stream: Handle) -> CuResult {
    in_context(|driver, _, _| {
        driver.captures.refuse_wait(stream)?;
        driver.streams.remove(stream).map(|_| ())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(stream: Handle) -> CuResult {
    in_context(|driver, _, _| {
        driver.check_stream(stream)?;
        driver.captures.refuse_wait(stream)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(stream: Handle) -> CuResult {
    cuStreamSynchronize(stream)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: u32) -> CuResult {
    in_context(|driver, _, _| {
        driver.check_stream(stream)?;
        let event = driver.events.get(event)?;
        let (mark, recorded) = (lock(&event.captured).clone(), *lock(&event.recorded));
        driver.captures.wait(stream, mark, recorded.is_some())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamGetCtx(stream: Handle, context: Out<Handle>) -> CuResult {
    in_context(|driver, current, _| {
        context.set(match stream {
            0..=2 => current,
            _ => driver.streams.get(stream)?.context,
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamGetFlags(stream: Handle, flags: Out<u32>) -> CuResult {
    in_context(|driver, _, _| {
        flags.set(match stream {
            0..=2 => 0,
            _ => driver.streams.get(stream)?.flags,
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamGetPriority(stream: Handle, priority: Out<i32>) -> CuResult {
    in_context(|driver, _, _| {
        priority.set(match stream {
            0..=2 => 0,
            _ => driver.streams.get(stream)?.priority,
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamGetId(stream: Handle, id: Out<u64>) -> CuResult {
    in_context(|driver, _, _| {
        driver.check_stream(stream)?;
        id.set(stream as u64)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamGetDevice(stream: Handle, device: Out<i32>) -> CuResult {
    in_context(|driver, _, _| {
        driver.check_stream(stream)?;
        device.set(0)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuLaunchHostFunc(
    stream: Handle,
    function: Option<unsafe extern "C" fn(*mut c_void)>,
    data: *mut c_void,
) -> CuResult {
    in_context(|driver, _, context| {
        let function = function.ok_or(CuResult::ERROR_INVALID_VALUE)?;
        let data = data as usize;
        driver.submit(context, stream, move |_, _| {
            // SAFETY: the caller passes a function and the data that it takes.
            unsafe { function(data as *mut c_void) };
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventCreate(event: Out<Handle>, flags: u32) -> CuResult {
    const DISABLE_TIMING: u32 = 2;
    in_context(|driver, context, _| {
        let timed = flags & DISABLE_TIMING == 0;
        event.set(driver.events.insert(Event {
            context,
            timed,
            recorded: Default::default(),
            captured: Default::default(),
        }))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: Handle) -> CuResult {
    in_context(|driver, _, _| driver.events.remove(event).map(|_| ()))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: Handle, stream: Handle) -> CuResult {
    cuEventRecordWithFlags(event, stream, 0)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecordWithFlags(event: Handle, stream: Handle, _flags: u32) -> CuResult {
    in_context(|driver, _, context| {
        driver.check_stream(stream)?;
        let event = driver.events.get(event)?;
        *lock(&event.captured) = driver.captures.mark(stream);
        if lock(&event.captured).is_some() {
            return Ok(());
        }
        driver.submit(context, stream, move |_, _| {
            *lock(&event.recorded) = Some(Instant::now());
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(event: Handle) -> CuResult {
    in_context(|driver, _, _| Mark::refuse(&driver.events.get(event)?.captured))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: Handle) -> CuResult {
    cuEventSynchronize(event)
}

/// The time that the simulation took between the events, not what a GPU would take.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventElapsedTime_v2(
    milliseconds: Out<f32>,
    start: Handle,
    end: Handle,
) -> CuResult {
    in_context(|driver, _, _| {
        let time = |event: Handle| {
            let event = driver.events.get(event)?;
            Mark::refuse(&event.captured)?;
            let recorded = *lock(&event.recorded);
            recorded
                .filter(|_| event.timed)
                .ok_or(CuResult::ERROR_INVALID_HANDLE)
        };
        let (start, end) = (time(start)?, time(end)?);
        let elapsed = match end.checked_duration_since(start) {
            Some(elapsed) => elapsed.as_secs_f32(),
            None => -start.duration_since(end).as_secs_f32(),
        };
        milliseconds.set(1000.0 * elapsed)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuProfilerStart() -> CuResult {
    in_context(|_, _, _| Ok(()))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuProfilerStop() -> CuResult {
    in_context(|_, _, _| Ok(()))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamAddCallback(
    stream: Handle,
    callback: Option<unsafe extern "C" fn(Handle, CuResult, *mut c_void)>,
    data: *mut c_void,
    _flags: u32,
) -> CuResult {
    in_context(|driver, _, _| {
        driver.check_stream(stream)?;
        driver.captures.refuse_wait(stream)?;
        let callback = callback.ok_or(CuResult::ERROR_INVALID_VALUE)?;
        // SAFETY: the caller passes a function and the data that it takes.
        unsafe { callback(stream, CuResult::SUCCESS, data) };
        Ok(())
    })
}
