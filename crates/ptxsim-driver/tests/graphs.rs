//! Stream capture and graphs, through cudarc unmodified.

mod support;

use cudarc::driver::sys::{
    self, CUgraphInstantiate_flags as Flags, CUresult, CUstreamCaptureMode as Mode,
    CUstreamCaptureStatus as Status,
};
use cudarc::driver::{CudaContext, DriverError, PushKernelArg};
use std::sync::Arc;
use support::*;

/// A context whose buffers have no events of their own, as captures need it.
fn untracked() -> Arc<CudaContext> {
    let context = context();
    // SAFETY: each test uses its buffers on streams that it orders itself.
    unsafe { context.disable_event_tracking() };
    context
}

fn failed<T>(result: Result<T, DriverError>) -> CUresult {
    result.map(|_| ()).unwrap_err().0
}

#[test]
fn a_graph_does_again_what_was_captured() {
    let _guard = exclusively();
    let context = untracked();
    let stream = context.new_stream().unwrap();
    let add = function(&context, VECTORS, "add");
    let mut input = vec![1.0f32; 256];
    let mut source = stream.clone_htod(&input).unwrap();
    let mut sum = stream.alloc_zeros::<f32>(256).unwrap();
    let count = 256i32;

    stream
        .begin_capture(Mode::CU_STREAM_CAPTURE_MODE_GLOBAL)
        .unwrap();
    assert_eq!(
        stream.capture_status().unwrap(),
        Status::CU_STREAM_CAPTURE_STATUS_ACTIVE
    );
    stream.memcpy_htod(&input, &mut source).unwrap();
    stream.memset_zeros(&mut sum).unwrap();
    for _ in 0..2 {
        // SAFETY: the arguments are the kernel's, and the buffers hold 256 elements.
        unsafe {
            stream
                .launch_builder(&add)
                .arg(&source)
                .arg(&sum)
                .arg(&sum)
                .arg(&count)
                .launch(threads(1, 256))
        }
        .unwrap();
    }
    let graph = stream.end_capture(Flags(0)).unwrap().unwrap();
    assert_eq!(
        stream.capture_status().unwrap(),
        Status::CU_STREAM_CAPTURE_STATUS_NONE
    );
    // Nothing has run yet.
    assert_eq!(stream.clone_dtoh(&sum).unwrap(), [0.0; 256]);
    graph.upload().unwrap();
    for value in [1.0, 3.0] {
        // The copy reads the host's memory when the graph runs.
        input.fill(value);
        graph.launch().unwrap();
        assert_eq!(stream.clone_dtoh(&sum).unwrap(), [2.0 * value; 256]);
    }
}

#[test]
fn streams_join_a_capture_by_events() {
    let _guard = exclusively();
    let context = untracked();
    let (stream, side) = (context.new_stream().unwrap(), context.new_stream().unwrap());
    let mut buffer = stream.alloc_zeros::<u8>(8).unwrap();
    let mut capture = |join: bool| {
        stream
            .begin_capture(Mode::CU_STREAM_CAPTURE_MODE_GLOBAL)
            .unwrap();
        side.wait(&stream.record_event(None).unwrap()).unwrap();
        assert_eq!(
            side.capture_status().unwrap(),
            Status::CU_STREAM_CAPTURE_STATUS_ACTIVE
        );
        side.memset_zeros(&mut buffer).unwrap();
        if join {
            stream.wait(&side.record_event(None).unwrap()).unwrap();
        }
        stream.end_capture(Flags(0))
    };
    assert_eq!(
        failed(capture(false)),
        CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED
    );
    let graph = capture(true).unwrap().unwrap();
    stream.memcpy_htod(&[7u8; 8], &mut buffer).unwrap();
    graph.launch().unwrap();
    assert_eq!(stream.clone_dtoh(&buffer).unwrap(), [0; 8]);
}

#[test]
fn what_a_capture_cannot_hold_ends_it() {
    let _guard = exclusively();
    let context = untracked();
    let stream = context.new_stream().unwrap();
    let outside = stream.record_event(None).unwrap();
    let begin = |mode| stream.begin_capture(mode).unwrap();
    let end_is_refused = || {
        assert_eq!(
            failed(stream.end_capture(Flags(0))),
            CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
        );
    };
    begin(Mode::CU_STREAM_CAPTURE_MODE_GLOBAL);
    assert_eq!(
        failed(stream.begin_capture(Mode::CU_STREAM_CAPTURE_MODE_GLOBAL)),
        CUresult::CUDA_ERROR_ILLEGAL_STATE
    );
    assert_eq!(
        failed(stream.synchronize()),
        CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
    );
    end_is_refused();

    begin(Mode::CU_STREAM_CAPTURE_MODE_GLOBAL);
    assert_eq!(
        failed(stream.wait(&outside)),
        CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION
    );
    end_is_refused();

    // Allocations, unless the capture or the thread is relaxed.
    begin(Mode::CU_STREAM_CAPTURE_MODE_GLOBAL);
    let mut pointer = 0;
    // SAFETY: the pointer is valid.
    let allocate = |pointer: &mut u64| unsafe { sys::cuMemAlloc_v2(pointer, 16) };
    assert_eq!(
        allocate(&mut pointer),
        CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
    );
    end_is_refused();
    begin(Mode::CU_STREAM_CAPTURE_MODE_RELAXED);
    ok(allocate(&mut pointer));
    stream.end_capture(Flags(0)).unwrap().unwrap();
    begin(Mode::CU_STREAM_CAPTURE_MODE_GLOBAL);
    let mut mode = Mode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: the pointer is valid.
    ok(unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) });
    assert_eq!(mode, Mode::CU_STREAM_CAPTURE_MODE_GLOBAL);
    ok(allocate(&mut pointer));
    // SAFETY: as above.
    ok(unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) });
    assert_eq!(mode, Mode::CU_STREAM_CAPTURE_MODE_RELAXED);
    stream.end_capture(Flags(0)).unwrap().unwrap();

    assert_eq!(
        failed(stream.end_capture(Flags(0))),
        CUresult::CUDA_ERROR_ILLEGAL_STATE
    );
}

#[test]
fn flags_of_an_instantiation_are_known_ones() {
    let _guard = exclusively();
    let context = untracked();
    let stream = context.new_stream().unwrap();
    let mut buffer = stream.alloc_zeros::<u8>(8).unwrap();
    let mut instantiated = |flags: Flags| {
        stream
            .begin_capture(Mode::CU_STREAM_CAPTURE_MODE_GLOBAL)
            .unwrap();
        stream.memset_zeros(&mut buffer).unwrap();
        stream.end_capture(flags)
    };
    let free = Flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let by_device = Flags::CUDA_GRAPH_INSTANTIATE_FLAG_DEVICE_LAUNCH;
    let priorities = Flags::CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY;
    for flags in [Flags(0), free, priorities, free | priorities] {
        instantiated(flags).unwrap().unwrap().launch().unwrap();
    }
    let upload = Flags::CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD;
    for flags in [upload, free | by_device, Flags(16)] {
        let refused = failed(instantiated(flags));
        assert_eq!(refused, CUresult::CUDA_ERROR_INVALID_VALUE, "{flags:?}");
    }
    assert_eq!(
        failed(instantiated(by_device)),
        CUresult::CUDA_ERROR_NOT_SUPPORTED
    );
}
