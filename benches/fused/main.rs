//! Fused against unfused: the LoRA layer, forward and backward, and every other operation that does in one pass what
//! takes several otherwise. On a CUDA device over the shapes of Llama models, timed between two events; without one on
//! the CPU device. The test `fused` of the tensor crate runs each on a simulated device and tiny shapes.

#[path = "../gpu_bench/case.rs"]
mod case;
#[path = "../gpu_bench/cases/mod.rs"]
mod cases;
#[path = "../device/mod.rs"]
mod device;
#[path = "../lora_layer/on_cpu.rs"]
mod layer;
#[path = "../lora_layer/mod.rs"]
mod lora_layer;
mod on_cpu;
mod on_cuda;
#[path = "../gpu_bench/timing.rs"]
mod timing;

use anyhow::Result;
use criterion::Criterion;
use device::Device;
use std::time::Duration;

/// Runs as often as it is told, and says how long that took.
type Side<'a> = Box<dyn FnMut(u64) -> Result<Duration> + 'a>;

/// Criterion, and what it was given to time.
struct Bench {
    criterion: Criterion,
    rows: Vec<Row>,
}

/// The median time of each side, seconds.
struct Row {
    name: String,
    sides: [f64; 2],
}

fn main() -> Result<()> {
    let criterion = Criterion::default()
        .without_plots()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(300))
        .configure_from_args();
    let mut bench = Bench {
        criterion,
        rows: Vec::new(),
    };
    match Device::open() {
        Ok(device) => on_cuda::run(&device, &on_cuda::LLAMA, &mut bench)?,
        Err(error) => {
            println!("{error}: what follows was measured on the CPU device, on small shapes");
            on_cpu::run(&on_cpu::SMALL, &mut bench)?;
        }
    }
    bench.criterion.final_summary();
    print!("{}", bench.table());
    Ok(())
}

impl Bench {
    /// Times an operation on a shape, fused and unfused.
    fn compare(&mut self, name: &str, sides: [Side; 2]) -> Result<()> {
        let mut failed = None;
        let mut medians = [0.0; 2];
        let mut group = self.criterion.benchmark_group(name);
        for (index, mut side) in sides.into_iter().enumerate() {
            let mut times = Vec::new();
            group.bench_function(["fused", "unfused"][index], |bencher| {
                bencher.iter_custom(|count| match side(count) {
                    Ok(time) => {
                        times.push(time.as_secs_f64() / count as f64);
                        time
                    }
                    Err(error) => {
                        failed = Some(error);
                        Duration::from_secs(1)
                    }
                });
            });
            times.sort_by(f64::total_cmp);
            medians[index] = times.get(times.len() / 2).copied().unwrap_or_default();
        }
        group.finish();
        if let Some(error) = failed {
            return Err(error.context(name.to_owned()));
        }
        // Nothing was timed where a filter leaves it out.
        if medians.iter().all(|&median| median > 0.0) {
            self.rows.push(Row {
                name: name.to_owned(),
                sides: medians,
            });
        }
        Ok(())
    }

    fn table(&self) -> String {
        let mut text =
            String::from("\n| operation | fused, us | unfused, us | unfused / fused |\n");
        text += "| --- | --- | --- | --- |\n";
        for Row { name, sides } in &self.rows {
            let [fused, unfused] = sides.map(|seconds| 1e6 * seconds);
            let ratio = unfused / fused;
            text += &format!("| {name} | {fused:.1} | {unfused:.1} | {ratio:.2} |\n");
        }
        text
    }
}
