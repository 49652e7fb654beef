//! The CUDA device: its storage, and every operation on it against the f64 reference, on the simulated driver
//! and on a GPU where there is one.
#![cfg(feature = "cuda")]

mod adamw_8bit;
mod adapter_parts;
mod dequantized;
mod graphs;
mod operations;
mod refusals;
mod sample;
mod storage;

use fuselora_tensor::Device;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

/// Set to `gpu` in the process that tests on one.
const VARIABLE: &str = "FUSELORA_TEST_DEVICE";

fn on_gpu() -> bool {
    std::env::var(VARIABLE).is_ok_and(|device| device == "gpu")
}

/// A GPU, or a simulated H100, which runs the modules of every architecture. A process has one CUDA driver, so the
/// tests share the device.
pub fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let open = || {
        if !on_gpu() {
            ptxsim_driver::select("h100").expect("the simulated driver opens");
        }
        Device::cuda(0).expect("there is a device")
    };
    DEVICE.get_or_init(open).clone()
}

/// A process has one CUDA driver, so the GPU's turn takes another process.
#[test]
fn the_same_on_a_gpu() {
    if on_gpu() {
        return;
    }
    let driver_files = ["/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so"];
    if !driver_files.iter().any(|file| Path::new(file).exists()) {
        println!("skipped: this machine has no NVIDIA GPU");
        return;
    }
    let status = Command::new(std::env::current_exe().unwrap())
        .env(VARIABLE, "gpu")
        .status()
        .unwrap();
    assert!(status.success(), "the tests failed on the GPU");
}
