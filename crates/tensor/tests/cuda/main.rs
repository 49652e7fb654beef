//! The CUDA device: its storage, and every operation on it against the f64 reference, on the simulated driver.
#![cfg(feature = "cuda")]

mod operations;
mod sample;
mod storage;

use fuselora_tensor::Device;
use std::sync::OnceLock;

/// A simulated H100, which runs the modules of every architecture. A process has one CUDA driver, so the tests share
/// the device.
pub fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let open = || {
        ptxsim_driver::select("h100").expect("the simulated driver opens");
        Device::cuda(0).expect("there is a device")
    };
    DEVICE.get_or_init(open).clone()
}
