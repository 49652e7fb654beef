//! Stream capture and the graphs that come of it.

use crate::capture::{Graph, Mode, THREAD_MODE};
use crate::error::CuResult;
use crate::pointer::Out;
use crate::state::{Handle, call, in_context, with_driver};

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamBeginCapture_v2(stream: Handle, mode: u32) -> CuResult {
    const NON_BLOCKING: u32 = 1;
    in_context(|driver, context, _| {
        driver.check_stream(stream)?;
        let blocking = match stream {
            0..=2 => true,
            _ => driver.streams.get(stream)?.flags & NON_BLOCKING == 0,
        };
        driver
            .captures
            .begin(context, stream, blocking, Mode::of(mode)?)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamEndCapture(stream: Handle, graph: Out<Handle>) -> CuResult {
    in_context(|driver, _, _| {
        driver.check_stream(stream)?;
        match driver.captures.end(stream) {
            Ok(captured) => graph.set(driver.captures.graphs.insert(captured)),
            Err(code) => {
                graph.set(0)?;
                Err(code)
            }
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamIsCapturing(stream: Handle, status: Out<u32>) -> CuResult {
    const NONE: u32 = 0;
    const ACTIVE: u32 = 1;
    const INVALIDATED: u32 = 2;
    in_context(|driver, _, _| {
        driver.check_stream(stream)?;
        status.set(match driver.captures.of(stream) {
            None => NONE,
            Some(capture) if capture.is_invalid() => INVALIDATED,
            Some(_) => ACTIVE,
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuThreadExchangeStreamCaptureMode(mode: crate::pointer::InOut<u32>) -> CuResult {
    call(|| {
        let old = THREAD_MODE.replace(Mode::of(mode.get()?)?);
        mode.set(old as u32)
    })
}

/// Work runs in its order and a graph allocates nothing, so that freeing on launch and priorities change nothing.
/// Graphs that kernels launch are not simulated.
#[unsafe(no_mangle)]
pub extern "C" fn cuGraphInstantiateWithFlags(
    executable: Out<Handle>,
    graph: Handle,
    flags: u64,
) -> CuResult {
    const AUTO_FREE_ON_LAUNCH: u64 = 1;
    const DEVICE_LAUNCH: u64 = 4;
    const USE_NODE_PRIORITY: u64 = 8;
    in_context(|driver, _, _| {
        let both = AUTO_FREE_ON_LAUNCH | DEVICE_LAUNCH;
        let known = both | USE_NODE_PRIORITY;
        // Uploading (2) needs a stream, which this call has not.
        if flags & !known != 0 || flags & both == both {
            return Err(CuResult::ERROR_INVALID_VALUE);
        }
        if flags & DEVICE_LAUNCH != 0 {
            return Err(CuResult::ERROR_NOT_SUPPORTED);
        }
        let graph = driver.captures.graphs.get(graph)?;
        let (context, work) = (graph.context, graph.work.clone());
        executable.set(driver.captures.executables.insert(Graph { context, work }))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphUpload(executable: Handle, stream: Handle) -> CuResult {
    in_context(|driver, _, _| {
        driver.check_stream(stream)?;
        driver.captures.executables.get(executable).map(|_| ())
    })
}

/// On a stream that is capturing itself, the graph becomes a part of the new one.
#[unsafe(no_mangle)]
pub extern "C" fn cuGraphLaunch(executable: Handle, stream: Handle) -> CuResult {
    in_context(|driver, _, context| {
        let graph = driver.captures.executables.get(executable)?;
        driver.submit(context, stream, move |driver, context| {
            graph.work.iter().try_for_each(|work| work(driver, context))
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphExecDestroy(executable: Handle) -> CuResult {
    with_driver(|driver| driver.captures.executables.remove(executable).map(|_| ()))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphDestroy(graph: Handle) -> CuResult {
    with_driver(|driver| driver.captures.graphs.remove(graph).map(|_| ()))
}
