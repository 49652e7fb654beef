//! The traffic of a whole LoRA layer, forward and backward: counted on shapes that the simulator runs in a moment,
//! where it has to be what `traffic.rs` computes, and computed for a large one.

use crate::device::Device;
use crate::lora_layer::{Fused, Shape, Unfused, Wanted, fused};
use crate::{table, traffic};
use anyhow::{Result, ensure};
use fuselora_kernels::Element;
use ptxsim::Checks;
use ptxsim_driver::Simulator;

/// Many blocks and few, wide and tall, another rank, extents that are no tile's.
const SIMULATED: [(Shape, Element); 7] = [
    (shape([256, 256, 256, 16]), Element::F32),
    (shape([96, 200, 136, 4]), Element::F32),
    (shape([256, 256, 256, 16]), Element::Bf16),
    (shape([1024, 512, 128, 16]), Element::Bf16),
    (shape([512, 1024, 2048, 16]), Element::Bf16),
    (shape([96, 200, 136, 8]), Element::Bf16),
    (shape([320, 256, 512, 32]), Element::F16),
];

const LARGE: Shape = shape([8192, 4096, 4096, 16]);

/// How the large shape is stored, bytes an element.
const BF16: u64 = 2;

/// The fused layer over its floor, at most.
const OF_THE_FLOOR: f64 = 1.10;

/// The fused layer over PEFT's sequence, at most.
const OF_THE_UNFUSED: f64 = 0.45;

const fn shape([tokens, in_features, out_features, rank]: [u32; 4]) -> Shape {
    Shape {
        tokens,
        in_features,
        out_features,
        rank,
    }
}

/// Bytes that a layer moved on the simulator.
pub struct Layer {
    shape: Shape,
    element: Element,
    fused: u64,
    unfused: u64,
}

/// Runs the layers, and compares what they moved with what is computed.
///
/// # Errors
/// Where the two differ, or where the driver refuses.
pub fn simulate() -> Result<Vec<Layer>> {
    let simulator = ptxsim_driver::select("h100")?;
    simulator.set_launch(0, Checks::none(), true);
    let device = Device::open()?;
    SIMULATED
        .into_iter()
        .map(|(shape, element)| count(simulator, &device, shape, element))
        .collect()
}

fn count(simulator: Simulator, device: &Device, shape: Shape, element: Element) -> Result<Layer> {
    let mut fused_layer = Fused::new(device, shape, element)?;
    let mut unfused_layer = Unfused::new(device, shape, element)?;
    let kernels = &device.kernels;

    simulator.take_launches();
    fused_layer.forward(kernels)?;
    fused_layer.backward(kernels, Wanted::All)?;
    let fused = moved(simulator);
    unfused_layer.forward(kernels)?;
    unfused_layer.backward(kernels)?;
    let unfused = moved(simulator);

    let size = element.size_in_bytes();
    let partials = fused::partials(shape, element);
    let computed = [
        traffic::fused(shape, size, partials),
        traffic::unfused(shape, size, Element::F32.size_in_bytes()),
    ];
    ensure!(
        [fused, unfused] == computed,
        "fused and unfused, {shape} in {element} moves {fused} and {unfused} bytes on the simulator, and {} and {} \
         by the formulas of benches/kernel_report/traffic.rs",
        computed[0],
        computed[1],
    );
    Ok(Layer {
        shape,
        element,
        fused,
        unfused,
    })
}

/// Different bytes that each launch since the last call read and wrote.
fn moved(simulator: Simulator) -> u64 {
    let launches = simulator.take_launches();
    let of = |counters: &ptxsim::Counters| counters.unique_read_bytes + counters.unique_write_bytes;
    launches.iter().map(|launch| of(&launch.counters)).sum()
}

/// The large shape, bytes.
struct Large {
    fused: u64,
    floor: u64,
    unfused: u64,
}

impl Large {
    fn compute() -> Large {
        let partials = fused::partials(LARGE, Element::Bf16);
        Large {
            fused: traffic::fused(LARGE, BF16, partials),
            floor: traffic::floor(LARGE, BF16),
            unfused: traffic::unfused(LARGE, BF16, BF16),
        }
    }

    fn of_the_floor(&self) -> f64 {
        self.fused as f64 / self.floor as f64
    }

    fn of_the_unfused(&self) -> f64 {
        self.fused as f64 / self.unfused as f64
    }
}

/// The limits that the large shape breaks, in words.
pub fn broken() -> Vec<String> {
    let large = Large::compute();
    let ratios = [
        ("its floor", large.of_the_floor(), OF_THE_FLOOR),
        ("PEFT's sequence", large.of_the_unfused(), OF_THE_UNFUSED),
    ];
    ratios
        .into_iter()
        .filter(|(_, ratio, limit)| ratio > limit)
        .map(|(of, ratio, limit)| {
            format!("the LoRA layer of {LARGE} in bf16 moves {ratio:.3} x {of}, at most {limit} x is allowed")
        })
        .collect()
}

/// The section of the report.
pub fn markdown(layers: &[Layer]) -> String {
    let mib = |bytes: u64| format!("{:.3}", bytes as f64 / f64::from(1 << 20));
    let simulated = table(
        &["tokens x in x out", "dtype", "fused, MiB", "unfused, MiB"],
        layers.iter().map(|layer| {
            vec![
                layer.shape.to_string(),
                layer.element.to_string(),
                mib(layer.fused),
                mib(layer.unfused),
            ]
        }),
    );
    let large = Large::compute();
    let f32_update = traffic::unfused(LARGE, BF16, Element::F32.size_in_bytes());
    let rows = [
        (
            "floor: x, W and y once, x once more for h; dy twice, x, W and dx once; the low-rank terms",
            large.floor,
            String::new(),
        ),
        (
            "fused: the floor, partial sums, the gradients added to",
            large.fused,
            format!("at most {OF_THE_FLOOR:.2} x the floor, {OF_THE_UNFUSED} x PEFT's"),
        ),
        ("PEFT's sequence, all in bf16", large.unfused, String::new()),
        (
            "PEFT's sequence, the update in f32, with its casts",
            f32_update,
            String::new(),
        ),
        (
            "every tensor once in each direction",
            traffic::tensors(LARGE, BF16),
            String::new(),
        ),
    ];
    let computed = table(
        &["what", "MB", "fused is", "limit"],
        rows.into_iter().map(|(what, bytes, limit)| {
            vec![
                what.to_owned(),
                format!("{:.1}", bytes as f64 / 1e6),
                format!("{:.3} x", large.fused as f64 / bytes as f64),
                limit,
            ]
        }),
    );
    format!(
        "\n## Traffic of a LoRA layer\n\n\
         Forward and backward, every launch's different bytes added up: each input once, each result once, nothing \
         kept in a cache between launches. *Unfused* is PEFT's sequence of operations on our own kernels, its update \
         in f32. The simulator counted these, and `benches/kernel_report/traffic.rs` computes each to the byte:\n\n\
         {simulated}\n\
         Not simulated, computed by the same formulas, {LARGE} in bf16:\n\n\
         {computed}"
    )
}
