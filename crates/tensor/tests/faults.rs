//! A kernel that fails on the device: the error names it, at the call itself or at the next one. The device is lost
//! with it, and so each test has a process of its own.
#![cfg(feature = "cuda")]

use fuselora_tensor::{DType, Device, Purpose, Result, Tensor, ops::swiglu};
use std::process::Command;

/// Names the test in the process that runs it.
const VARIABLE: &str = "FUSELORA_TEST_FAULT";

/// Runs `test` in another process.
fn alone(name: &str, test: impl FnOnce()) {
    if std::env::var(VARIABLE).is_ok_and(|chosen| chosen == name) {
        return test();
    }
    let status = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact"])
        .env(VARIABLE, name)
        .status()
        .unwrap();
    assert!(status.success());
}

/// A simulated device, and what makes its next kernel fail: a watchdog that lets no instruction pass.
fn device() -> (Device, impl Fn()) {
    let simulator = ptxsim_driver::select("h100").expect("the simulated driver opens");
    let device = Device::cuda(0).expect("there is a device");
    (device, move || simulator.set_max_instructions(0))
}

fn message(result: Result<impl Sized>) -> String {
    result.err().expect("the device has failed").to_string()
}

#[test]
fn a_kernel_that_fails_is_named() {
    alone("a_kernel_that_fails_is_named", || {
        let (device, fail) = device();
        let x = Tensor::full_f32(&device, [2, 4], 1.0).unwrap();
        swiglu::forward(&x, &x).unwrap();
        fail();
        let expected = "cuda:0: the CUDA driver reports the launch timed out and was terminated \
                        (CUDA_ERROR_LAUNCH_TIMEOUT); the last kernel before was swiglu_forward_f32";
        // A GPU tells it at one of the calls that follow, the simulator at once and at all that follow.
        for message in [
            message(swiglu::forward(&x, &x)),
            message(device.synchronize()),
            message(x.to_f32_vec()),
        ] {
            assert!(message.starts_with(expected), "{message}");
        }
    });
}

#[test]
fn the_kernels_of_a_graph_that_fails_are_named() {
    alone("the_kernels_of_a_graph_that_fails_are_named", || {
        let (device, fail) = device();
        let holding = device.hold(Purpose::Graphs);
        let x = Tensor::full_f32(&device, [2, 4], 1.0).unwrap();
        let mut y = Tensor::zeros(&device, [2, 4], DType::F32).unwrap();
        drop(holding);
        let mut work = || y.copy_from(&swiglu::forward(&x, &x)?);
        work().unwrap();
        let graph = device.capture(work).unwrap();
        assert!(graph.launch().unwrap());
        fail();
        let expected = "the work before was a captured graph of swiglu_forward_f32 (with CUDA_LAUNCH_BLOCKING=1";
        for message in [message(graph.launch()), message(device.synchronize())] {
            assert!(message.contains(expected), "{message}");
        }
    });
}
