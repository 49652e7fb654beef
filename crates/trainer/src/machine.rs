//! The device that `--device` names, and the precision on it.

use fuselora_tensor::Device;
use fuselora_transformer::quantize::Nf4Options;

use crate::cli::{DeviceArg, DtypeArg, MachineArgs};
use crate::mistake;

/// The precision where none is asked for, on every device: the one that PEFT's numbers are compared in.
pub const USUAL_DTYPE: DtypeArg = DtypeArg::F32;

/// Where and in which precision to compute.
pub struct Machine {
    /// The device, opened.
    pub device: Device,
    /// The precision: as asked for, or the usual one.
    pub dtype: DtypeArg,
    /// How projections are quantized as they are loaded, where they are.
    pub nf4: Option<Nf4Options>,
}

impl Machine {
    /// Opens the device.
    ///
    /// # Errors
    /// As [`open_device`].
    pub fn open(arguments: &MachineArgs) -> anyhow::Result<Machine> {
        let device = open_device(arguments.device)?;
        Ok(Machine {
            device,
            dtype: arguments.dtype.unwrap_or(USUAL_DTYPE),
            nf4: arguments.nf4(),
        })
    }
}

/// The device that `--device` names; says on standard error what `auto` has found.
///
/// # Errors
/// Where this machine or build has no such device.
pub fn open_device(argument: DeviceArg) -> anyhow::Result<Device> {
    match argument {
        DeviceArg::Cpu => Ok(Device::cpu()),
        DeviceArg::Auto => {
            let found = automatic()?;
            eprintln!("device: {found}");
            Ok(found)
        }
        DeviceArg::Cuda(ordinal) => cuda(ordinal),
        DeviceArg::Sim => simulated(),
    }
}

#[cfg(feature = "cuda")]
fn automatic() -> anyhow::Result<Device> {
    match Device::cuda_count() {
        0 => Ok(Device::cpu()),
        _ => cuda(0),
    }
}

#[cfg(feature = "cuda")]
fn cuda(ordinal: usize) -> anyhow::Result<Device> {
    Ok(Device::cuda(ordinal)?)
}

/// A simulated H100: its driver must be loaded before anything asks for one.
#[cfg(feature = "cuda")]
fn simulated() -> anyhow::Result<Device> {
    ptxsim_driver::select("h100").map_err(|error| mistake!("--device sim: {error}"))?;
    cuda(0)
}

#[cfg(not(feature = "cuda"))]
fn automatic() -> anyhow::Result<Device> {
    Ok(Device::cpu())
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize) -> anyhow::Result<Device> {
    Err(without_cuda("cuda"))
}

#[cfg(not(feature = "cuda"))]
fn simulated() -> anyhow::Result<Device> {
    Err(without_cuda("sim"))
}

#[cfg(not(feature = "cuda"))]
fn without_cuda(device: &str) -> anyhow::Error {
    mistake!(
        "--device {device}: this fuselora was built for the CPU alone; build it without --no-default-features"
    )
}
