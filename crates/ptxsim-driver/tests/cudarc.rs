//! cudarc, unmodified, on the simulated driver.

use cudarc::driver::sys::{CUfunction_attribute_enum as FunctionAttribute, CUresult};
use cudarc::driver::{CudaContext, CudaModule, DriverError, LaunchConfig, PushKernelArg, sys};
use cudarc::nvrtc::Ptx;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One test at a time: they look at the device's free memory and at the last fault.
fn exclusively() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

fn context() -> Arc<CudaContext> {
    ptxsim_driver::select("h100").expect("the simulated driver can be opened");
    CudaContext::new(0).expect("there is a device")
}

fn load(context: &Arc<CudaContext>) -> Arc<CudaModule> {
    context
        .load_module(Ptx::from_src(include_str!("ptx/vectors.ptx")))
        .expect("the PTX is valid")
}

fn threads(threads: u32) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (1, 1, 1),
        block_dim: (threads, 1, 1),
        shared_mem_bytes: 0,
    }
}

#[test]
fn adds_vectors() {
    let _guard = exclusively();
    let context = context();
    let add = load(&context).load_function("add").unwrap();
    let stream = context.new_stream().unwrap();
    let a: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let b: Vec<f32> = (0..1000).map(|i| 0.5 * i as f32).collect();
    let (a_device, b_device) = (
        stream.clone_htod(&a).unwrap(),
        stream.clone_htod(&b).unwrap(),
    );
    let mut sum = stream.alloc_zeros::<f32>(1000).unwrap();
    let config = LaunchConfig {
        grid_dim: (4, 1, 1),
        block_dim: (256, 1, 1),
        shared_mem_bytes: 0,
    };
    let mut launch = stream.launch_builder(&add);
    launch
        .arg(&a_device)
        .arg(&b_device)
        .arg(&mut sum)
        .arg(&1000i32);
    // SAFETY: the arguments are the kernel's, and the buffers hold 1000 elements.
    unsafe { launch.launch(config) }.unwrap();
    let expected: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
    assert_eq!(stream.clone_dtoh(&sum).unwrap(), expected);
}

#[test]
fn reads_and_writes_module_globals() {
    let _guard = exclusively();
    let context = context();
    let module = load(&context);
    let stream = context.default_stream();
    let (mut factor, mut bytes) = (0, 0);
    let name = c"factor";
    // SAFETY: the module is loaded and the pointers are valid.
    let found = unsafe {
        sys::cuModuleGetGlobal_v2(
            &mut factor,
            &mut bytes,
            module_handle(&module),
            name.as_ptr(),
        )
    };
    assert_eq!((found, bytes), (CUresult::CUDA_SUCCESS, 4));

    let mut values = stream.clone_htod(&[1.0f32, 2.0, 3.0]).unwrap();
    let scale = module.load_function("scale").unwrap();
    // SAFETY: three threads, three values.
    unsafe {
        stream
            .launch_builder(&scale)
            .arg(&mut values)
            .launch(threads(3))
    }
    .unwrap();
    assert_eq!(stream.clone_dtoh(&values).unwrap(), [2.0, 4.0, 6.0]);

    let ten = 10.0f32.to_ne_bytes();
    // SAFETY: the variable holds four bytes.
    let copied = unsafe { sys::cuMemcpyHtoD_v2(factor, ten.as_ptr().cast(), 4) };
    assert_eq!(copied, CUresult::CUDA_SUCCESS);
    // SAFETY: as above.
    unsafe {
        stream
            .launch_builder(&scale)
            .arg(&mut values)
            .launch(threads(3))
    }
    .unwrap();
    assert_eq!(stream.clone_dtoh(&values).unwrap(), [20.0, 40.0, 60.0]);
}

/// The handle behind cudarc's module, through one of its functions.
fn module_handle(module: &Arc<CudaModule>) -> sys::CUmodule {
    let function = module.load_function("scale").unwrap();
    let mut handle = std::ptr::null_mut();
    // SAFETY: the function is loaded and the pointer is valid.
    let found = unsafe { sys::cuFuncGetModule(&mut handle, function.cu_function()) };
    assert_eq!(found, CUresult::CUDA_SUCCESS);
    handle
}

#[test]
fn events_tell_the_time() {
    let _guard = exclusively();
    let context = context();
    let stream = context.new_stream().unwrap();
    let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
    let start = stream.record_event(flags).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let end = stream.record_event(flags).unwrap();
    let elapsed = start.elapsed_ms(&end).unwrap();
    assert!((20.0..2000.0).contains(&elapsed), "{elapsed} ms");
    let untimed = stream.record_event(None).unwrap();
    assert!(
        start.elapsed_ms(&untimed).is_err(),
        "an event without timing has no time"
    );
}

#[test]
fn memory_runs_out_and_comes_back() {
    let _guard = exclusively();
    let context = context();
    let stream = context.default_stream();
    let (before, total) = context.mem_get_info().unwrap();
    let held = stream.alloc_zeros::<u8>(1 << 20).unwrap();
    assert!(context.mem_get_info().unwrap().0 <= before - (1 << 20));
    // SAFETY: the buffer is not read.
    let refused = unsafe { stream.alloc::<u8>(total) }.unwrap_err();
    assert_eq!(refused, DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY));
    drop(held);
    assert_eq!(context.mem_get_info().unwrap().0, before);
}

#[test]
fn a_fault_sticks_until_its_context_is_destroyed() {
    let _guard = exclusively();
    let simulator = ptxsim_driver::select("h100").unwrap();
    let own = CudaContext::new_non_primary(0, 0).unwrap();
    let illegal = DriverError(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    {
        let stream = own.new_stream().unwrap();
        let overrun = load(&own).load_function("overrun").unwrap();
        let mut values = stream.alloc_zeros::<f32>(64).unwrap();
        let mut launch = stream.launch_builder(&overrun);
        launch.arg(&mut values).arg(&64i32);
        // SAFETY: the kernel leaves its buffer, which the simulator reports and does not do.
        assert_eq!(unsafe { launch.launch(threads(128)) }.unwrap_err(), illegal);
        let report = simulator.last_fault().unwrap();
        assert!(
            report.contains("overrun") && report.contains("vectors.cu:13"),
            "{report}"
        );
        assert_eq!(stream.synchronize().unwrap_err(), illegal);
        assert_eq!(stream.alloc_zeros::<f32>(1).unwrap_err(), illegal);
    }
    drop(own);
    let fresh = context();
    fresh.bind_to_thread().unwrap();
    assert_eq!(
        fresh.default_stream().clone_htod(&[1u8]).map(|_| ()),
        Ok(())
    );
}

#[test]
fn large_shared_memory_has_to_be_asked_for() {
    let _guard = exclusively();
    let context = context();
    let stream = context.default_stream();
    let function = load(&context).load_function("shared_sum").unwrap();
    let mut sum = stream.alloc_zeros::<f32>(1).unwrap();
    let count = 25_000; // floats: more than 48 KiB, less than 227
    let config = LaunchConfig {
        shared_mem_bytes: 4 * count as u32,
        ..threads(64)
    };
    let mut launch = || {
        let mut launch = stream.launch_builder(&function);
        launch.arg(&mut sum).arg(&count);
        // SAFETY: the shared memory holds `count` floats.
        unsafe { launch.launch(config) }.map(|_| ())
    };
    assert_eq!(
        launch(),
        Err(DriverError(CUresult::CUDA_ERROR_INVALID_VALUE))
    );
    let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    function.set_attribute(attribute, 4 * count).unwrap();
    assert_eq!(launch(), Ok(()));
    assert!(
        function.set_attribute(attribute, 228 << 10).is_err(),
        "more than the device has"
    );
    assert_eq!(stream.clone_dtoh(&sum).unwrap(), [25_000.0]);
    // 100,000 bytes and the 1 KiB reserve, twice in 228 KiB.
    let blocks =
        function.occupancy_max_active_blocks_per_multiprocessor(64, 4 * count as usize, None);
    assert_eq!(blocks, Ok(2));
}

#[test]
fn refuses_bad_ptx_and_says_why() {
    let _guard = exclusively();
    let simulator = ptxsim_driver::select("h100").unwrap();
    let context = context();
    let text = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k() { bogus.u32; }";
    let error = context.load_module(Ptx::from_src(text)).unwrap_err();
    assert_eq!(error, DriverError(CUresult::CUDA_ERROR_INVALID_PTX));
    assert!(simulator.last_fault().unwrap().contains("bogus"));
}

#[test]
fn describes_the_device() {
    let _guard = exclusively();
    let context = context();
    assert_eq!(context.compute_capability(), Ok((9, 0)));
    assert!(context.name().unwrap().contains("H100"));
    assert!(
        ptxsim_driver::select("a100").is_err(),
        "the device exists as an H100"
    );
    assert!(ptxsim_driver::select("voodoo2").is_err());
}
