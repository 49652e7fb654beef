//! Every row of `gpu_bench` can be measured: on a simulated device, tiny shapes, and with every check on. Its times mean
//! nothing there; what fails here would be a row without a time on a GPU.
#![cfg(feature = "cuda")]

#[path = "../benches/gpu_bench/case.rs"]
mod case;
#[path = "../benches/gpu_bench/cases/mod.rs"]
mod cases;
#[path = "../benches/device/mod.rs"]
mod device;
#[path = "../benches/lora_layer/mod.rs"]
mod lora_layer;
#[path = "../benches/gpu_bench/timing.rs"]
mod timing;

use case::{Case, Scope};
use cases::GROUPS;
use device::Device;
use ptxsim::Checks;
use ptxsim_driver::Simulator;
use std::collections::HashSet;
use timing::{Effort, Timed};

/// Its bytes and operations are the least that it needs, for rates and ratios to the ceilings come from them: kernels
/// move and compute no less on the simulator.
#[test]
fn every_row_is_measured() {
    let simulator = ptxsim_driver::select("h100").expect("the simulated driver opens");
    let device = Device::open().expect("there is a device");
    let mut failed = Vec::new();
    for case in GROUPS.iter().flat_map(|(_, cases)| cases(Scope::Tiny)) {
        let row = format!("{} {:?} {}", case.name, case.shape, case.element);
        simulator.set_launch(0, Checks::all(), false);
        match timing::time(&device, case.bytes, Effort::LEAST, &case.make) {
            Ok(Timed { median, range }) if 0.0 < range[0] && median <= range[1] => {}
            Ok(timed) => failed.push(format!("{row}: {timed:?}")),
            Err(error) => {
                failed.push(format!("{row}: {error:#}"));
                continue;
            }
        }
        simulator.set_launch(0, Checks::none(), true);
        let Some(counted) = count(simulator, &device, &case) else {
            continue;
        };
        let claimed = [case.bytes, case.flops];
        if claimed[0] > counted[0] || claimed[1] > counted[1] {
            failed.push(format!(
                "{row}: bytes and operations {claimed:?}, but the simulator counts {counted:?}"
            ));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// Different bytes that the kernels of a call read and write, and their operations; nothing where it has no kernel.
fn count(simulator: Simulator, device: &Device, case: &Case) -> Option<[u64; 2]> {
    let mut call = (case.make)(device).expect("it was measured before");
    simulator.take_launches();
    call(&device.kernels).expect("it was measured before");
    let launches = simulator.take_launches();
    launches
        .iter()
        .map(|launch| {
            let c = &launch.counters;
            [
                c.unique_read_bytes + c.unique_write_bytes,
                c.tensor_flops + c.flops,
            ]
        })
        .reduce(|a, b| [a[0] + b[0], a[1] + b[1]])
}

/// Peers are matched by operation, shape and type, so no two rows have the same.
#[test]
fn rows_differ() {
    for scope in [Scope::Full, Scope::Quick, Scope::Tiny] {
        let mut seen = HashSet::new();
        for case in GROUPS.iter().flat_map(|(_, cases)| cases(scope)) {
            let row = (case.name, case.shape.clone(), case.element);
            assert!(
                seen.insert(row.clone()),
                "{row:?} stands twice in {scope:?}"
            );
            assert!(case.bytes > 0, "{row:?}");
        }
    }
}

/// A group that the script left out would miss in the report.
#[test]
fn the_script_runs_every_group() {
    let script = include_str!("../benches/gpu_bench/run.sh");
    let groups = script
        .lines()
        .find_map(|line| line.strip_prefix("for group in ")?.strip_suffix("; do"))
        .expect("the script goes through groups");
    let names: Vec<&str> = GROUPS.iter().map(|(name, _)| *name).collect();
    assert_eq!(groups.split(' ').collect::<Vec<_>>(), names);
}
