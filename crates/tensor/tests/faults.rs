//! A kernel that fails on the device: the error names it, at the call itself or at the next one. The device is lost
//! with it, and so each test has a process of its own.
#![cfg(feature = "cuda")]

use fuselora_tensor::{DType, Device, Purpose, Result, Tensor, ops::gather};
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

/// A simulated device, a table of three rows, and the indices of two.
fn device() -> (Device, Tensor, Tensor) {
    ptxsim_driver::select("h100").expect("the simulated driver opens");
    let device = Device::cuda(0).expect("there is a device");
    let _holding = device.hold(Purpose::Graphs);
    let table = Tensor::full_f32(&device, [3, 4], 1.0).unwrap();
    let ids = Tensor::from_u32(&device, [2], &[0, 2]).unwrap();
    (device, table, ids)
}

/// Lets indices be what the memory of two numbers held before. Their values are unspecified: no check sees them.
fn spoil(ids: &mut Tensor) {
    let device = ids.device().clone();
    drop(Tensor::full_f32(&device, [2], 1.0).unwrap());
    let garbage = Tensor::empty(&device, [2], DType::U32).unwrap();
    ids.copy_from(&garbage).unwrap();
}

fn message(result: Result<impl Sized>) -> String {
    result.err().expect("the device has failed").to_string()
}

#[test]
fn a_kernel_that_fails_is_named() {
    alone("a_kernel_that_fails_is_named", || {
        let (device, table, mut ids) = device();
        gather::rows(&table, &ids).unwrap();
        spoil(&mut ids);
        let expected = "cuda:0: the CUDA driver reports unspecified launch failure (CUDA_ERROR_LAUNCH_FAILED); the \
                        last kernel before was gather_f32";
        // A GPU tells it at one of the calls that follow, the simulator at once and at all that follow.
        for message in [
            message(gather::rows(&table, &ids)),
            message(device.synchronize()),
            message(table.to_f32_vec()),
        ] {
            assert!(message.starts_with(expected), "{message}");
        }
    });
}

#[test]
fn the_kernels_of_a_graph_that_fails_are_named() {
    alone("the_kernels_of_a_graph_that_fails_are_named", || {
        let (device, table, mut ids) = device();
        let work = || gather::rows(&table, &ids).map(drop);
        work().unwrap();
        let graph = device.capture(work).unwrap();
        assert!(graph.launch().unwrap());
        spoil(&mut ids);
        let expected =
            "the work before was a captured graph of gather_f32 (with CUDA_LAUNCH_BLOCKING=1";
        for message in [message(graph.launch()), message(device.synchronize())] {
            assert!(message.contains(expected), "{message}");
        }
    });
}
