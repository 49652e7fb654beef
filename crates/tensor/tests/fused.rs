//! Both sides of every comparison of the benchmark `fused` run: on a simulated device with every check on and on the
//! CPU, and tiny shapes.
#![cfg(feature = "cuda")]

#[path = "../../../benches/gpu_bench/case.rs"]
mod case;
#[path = "../../../benches/gpu_bench/cases/mod.rs"]
mod cases;
#[path = "../../../benches/device/mod.rs"]
mod device;
#[path = "../../../benches/lora_layer/on_cpu.rs"]
mod layer;
#[path = "../../../benches/lora_layer/mod.rs"]
mod lora_layer;
#[path = "../../../benches/fused/on_cpu.rs"]
mod on_cpu;
#[path = "../../../benches/fused/on_cuda.rs"]
mod on_cuda;
#[path = "../../../benches/gpu_bench/timing.rs"]
mod timing;

use anyhow::{Context, Result};
use std::time::Duration;

/// Runs as often as it is told, and says how long that took.
type Side<'a> = Box<dyn FnMut(u64) -> Result<Duration> + 'a>;

/// In place of the benchmark's: runs each side twice.
#[derive(Default)]
struct Bench {
    names: Vec<String>,
}

impl Bench {
    fn compare(&mut self, name: &str, sides: [Side; 2]) -> Result<()> {
        for mut side in sides {
            let time = side(2).with_context(|| name.to_owned())?;
            assert!(time > Duration::ZERO, "{name} took no time");
        }
        assert!(!self.names.iter().any(|own| own == name), "{name}: twice");
        self.names.push(name.to_owned());
        Ok(())
    }
}

#[test]
fn on_a_cuda_device() {
    ptxsim_driver::select("h100").expect("the simulated driver opens");
    let device = device::Device::open().expect("there is a device");
    let mut bench = Bench::default();
    on_cuda::run(&device, &on_cuda::TINY, &mut bench).unwrap();
}

#[test]
fn on_the_cpu() {
    on_cpu::run(&on_cpu::TINY, &mut Bench::default()).unwrap();
}
