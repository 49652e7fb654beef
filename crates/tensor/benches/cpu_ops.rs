//! The CPU operations at the shapes of a SmolLM2-135M training step on 4 x 256 tokens.
//!
//! Criterion times each operation. A table follows: the fused LoRA linear against the unfused one (three
//! products and an addition, each a call of its own), timed alternately in this run, and the share of the
//! machine's matrix-product rate that each reaches.

#[path = "../../../benches/lora_layer/on_cpu.rs"]
mod layer;

use criterion::{Criterion, Throughput};
use fuselora_tensor::{
    DType, Device, Tensor, Weight,
    ops::{
        attention::{self, AttentionConfig, Rows},
        cross_entropy,
        lora_linear::{self, Lora, Projection},
        rms_norm,
        rope::{self, RopeTable},
        segmented_lora::{self, Segment, Transposed},
        swiglu,
    },
};
use layer::Layer;
use std::{
    hint::black_box,
    time::{Duration, Instant},
};

const TOKENS: usize = 1024;
const RANK: usize = 8;

fn random(device: &Device, shape: &[usize]) -> Tensor {
    layer::random(device, shape).unwrap()
}

/// A layer of the model, and what it is called.
struct Named {
    name: &'static str,
    layer: Layer,
    flops: f64,
}

impl Named {
    fn new(name: &'static str, [tokens, in_features, out_features]: [usize; 3]) -> Named {
        let extents = [tokens, in_features, out_features, RANK];
        Named {
            name,
            layer: Layer::new(&Device::cpu(), extents).unwrap(),
            flops: 2.0 * (tokens * in_features * out_features) as f64,
        }
    }
}

/// `y = x · mᵀ` on all cores by the gemm crate itself: the machine's matrix-product rate.
fn product(y: &mut [f32], x: &[f32], m: &[f32], [rows, columns, depth]: [usize; 3]) {
    assert!(y.len() == rows * columns && x.len() == rows * depth && m.len() == columns * depth);
    // SAFETY: the lengths are checked above, and `y` is borrowed mutably.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            depth,
            y.as_mut_ptr(),
            1,
            columns as isize,
            false,
            x.as_ptr(),
            1,
            depth as isize,
            m.as_ptr(),
            depth as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
    }
}

/// The shortest time of each of `bodies`, called in turn: other load on the machine meets all alike.
fn fastest<const N: usize>(mut bodies: [&mut dyn FnMut(); N]) -> [Duration; N] {
    let mut best = [Duration::MAX; N];
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(1500) {
        for (best, body) in best.iter_mut().zip(&mut bodies) {
            let start = Instant::now();
            body();
            *best = start.elapsed().min(*best);
        }
    }
    best
}

fn compare(layers: &mut [Named]) {
    const N: usize = 512;
    let (x, m, mut y) = (vec![0.5; N * N], vec![0.25; N * N], vec![0.0; N * N]);
    let rate = |flops: f64, time: Duration| flops / time.as_secs_f64() / 1e9;
    println!(
        "\npeak: the gemm crate on {N} x {N} x {N} on all cores, timed in turn with each layer"
    );
    println!("(shares count the frozen product alone: the update's arithmetic is overhead)\n");
    println!(
        "layer                  | unfused ms | fused ms | ratio | peak GFLOP/s | forward share | backward ms | backward share"
    );
    for Named { name, layer, flops } in layers {
        let [_, h] = layer.fused_forward().unwrap();
        let [peak, unfused, fused] = fastest([
            &mut || product(&mut y, &x, &m, [N, N, N]),
            &mut || drop(black_box(layer.unfused_forward())),
            &mut || drop(black_box(layer.fused_forward())),
        ]);
        let [backward] = fastest([&mut || drop(black_box(layer.fused_backward(&h)))]);
        let peak = rate(2.0 * (N * N * N) as f64, peak);
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let share = |time: Duration| 100.0 * rate(*flops, time) / peak;
        println!(
            "{:<22} | {:>10.3} | {:>8.3} | {:>5.2} | {peak:>12.0} | {:>11.0} % | {:>11.3} | {:>12.0} %",
            name,
            ms(unfused),
            ms(fused),
            ms(unfused) / ms(fused),
            share(fused),
            ms(backward),
            share(backward),
        );
    }
}

fn lora_of([a, b, ..]: &[Tensor; 4]) -> Lora<'_> {
    Lora {
        a,
        b,
        scaling: 2.0,
        dropout: None,
    }
}

/// A batch whose rows have one adapter, and one whose rows have 16 adapters of their own, 4 each.
fn adapters(device: &Device) {
    const ROWS: usize = 64;
    const ADAPTERS: usize = 16;
    const RANK: usize = 16;
    println!("\n{ROWS} rows, rank {RANK} | 1 adapter, ms | {ADAPTERS} adapters, ms | ratio");
    for [in_features, out_features] in [
        [576, 576],
        [576, 1536],
        [1536, 576],
        [2048, 2048],
        [2048, 8192],
    ] {
        let x = random(device, &[ROWS, in_features]);
        let weight = Weight::Dense(random(device, &[out_features, in_features]));
        // A, B and their transposes.
        let factors: Vec<[Tensor; 4]> = (0..ADAPTERS)
            .map(|_| {
                [
                    random(device, &[RANK, in_features]),
                    random(device, &[out_features, RANK]),
                    random(device, &[in_features, RANK]),
                    random(device, &[RANK, out_features]),
                ]
            })
            .collect();
        let frozen = Projection {
            weight: &weight,
            bias: None,
            lora: None,
        };
        let single = Projection {
            lora: Some(lora_of(&factors[0])),
            ..frozen
        };
        let rows = ROWS / ADAPTERS;
        let segments: Vec<Segment> = factors
            .iter()
            .enumerate()
            .map(|(index, factors)| Segment {
                rows: index * rows..(index + 1) * rows,
                lora: lora_of(factors),
                transposed: Some(Transposed {
                    a: &factors[2],
                    b: &factors[3],
                }),
            })
            .collect();
        let [one, many] = fastest([
            &mut || drop(black_box(lora_linear::forward(&x, &[single]).unwrap())),
            &mut || {
                let mut y = lora_linear::forward(&x, &[frozen]).unwrap().remove(0).y;
                segmented_lora::add_assign(&mut y, &x, &segments).unwrap();
                drop(black_box(y));
            },
        ]);
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        println!(
            "{in_features:>5} to {out_features:>5}  | {:>13.3} | {:>15.3} | {:>5.2}",
            ms(one),
            ms(many),
            ms(many) / ms(one)
        );
    }
}

fn others(criterion: &mut Criterion, device: &Device) {
    let hidden = random(device, &[TOKENS, 576]);
    let weight = random(device, &[576]);
    criterion.bench_function("rms_norm forward_add [1024, 576]", |b| {
        b.iter(|| rms_norm::forward_add(&hidden, &hidden, &weight, 1e-5).unwrap());
    });
    let (_, rstd) = rms_norm::forward(&hidden, &weight, 1e-5).unwrap();
    let mut dx = hidden.try_clone().unwrap();
    criterion.bench_function("rms_norm backward [1024, 576]", |b| {
        b.iter(|| rms_norm::backward(&hidden, &hidden, &rstd, &weight, &mut dx, None).unwrap());
    });

    let inv_freq: Vec<f64> = (0..32).map(|i| 1e5f64.powf(-f64::from(i) / 32.0)).collect();
    let table = RopeTable::new(device, &inv_freq, 256, 1.0).unwrap();
    let positions: Vec<u32> = (0..TOKENS as u32).map(|token| token % 256).collect();
    let positions = Tensor::from_u32(device, [TOKENS], &positions).unwrap();
    let mut q = random(device, &[TOKENS, 576]);
    criterion.bench_function("rope [1024, 9 x 64]", |b| {
        b.iter(|| rope::apply(&mut q, 9, &positions, &table).unwrap())
    });

    let (k, v) = (
        random(device, &[TOKENS, 192]),
        random(device, &[TOKENS, 192]),
    );
    let rows = Rows::new(device, &[256; 4]).unwrap();
    let config = AttentionConfig {
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        scale: 0.125,
        window: None,
    };
    criterion.bench_function("attention forward 4 x 256, 9/3 heads", |b| {
        b.iter(|| attention::forward(&q, &k, &v, &rows, &rows, &config).unwrap());
    });
    let (o, lse) = attention::forward(&q, &k, &v, &rows, &rows, &config).unwrap();
    criterion.bench_function("attention backward 4 x 256, 9/3 heads", |b| {
        b.iter(|| {
            attention::backward(&hidden, &q, &k, &v, &o, &lse, &rows, &rows, &config).unwrap()
        });
    });

    let (gate, up) = (
        random(device, &[TOKENS, 1536]),
        random(device, &[TOKENS, 1536]),
    );
    criterion.bench_function("swiglu forward [1024, 1536]", |b| {
        b.iter(|| swiglu::forward(&gate, &up).unwrap())
    });
    let dact = random(device, &[TOKENS, 1536]);
    let (mut gate, mut up) = (Some(gate), Some(up));
    criterion.bench_function("swiglu backward [1024, 1536]", |b| {
        b.iter(|| {
            let (dgate, dup) =
                swiglu::backward(&dact, gate.take().unwrap(), up.take().unwrap()).unwrap();
            (gate, up) = (Some(dgate), Some(dup));
        });
    });

    let mut logits = random(device, &[128, 49152]);
    let targets = Tensor::from_u32(device, [128], &[7; 128]).unwrap();
    let mut loss = Tensor::zeros(device, [1], DType::F32).unwrap();
    let grad_scale = Tensor::full_f32(device, [1], 1.0).unwrap();
    criterion.bench_function("cross_entropy forward_backward [128, 49152]", |b| {
        b.iter(|| {
            cross_entropy::forward_backward(&mut logits, &targets, &grad_scale, &mut loss).unwrap()
        });
    });
}

fn main() {
    let device = Device::cpu();
    let mut layers = [
        Named::new("q, o      576 to   576", [TOKENS, 576, 576]),
        Named::new("k, v      576 to   192", [TOKENS, 576, 192]),
        Named::new("gate, up  576 to  1536", [TOKENS, 576, 1536]),
        Named::new("down     1536 to   576", [TOKENS, 1536, 576]),
        Named::new("1 token   576 to  1536", [1, 576, 1536]),
    ];
    let mut criterion = Criterion::default()
        .without_plots()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400))
        .configure_from_args();
    for Named { name, layer, flops } in &layers {
        let mut group = criterion.benchmark_group(*name);
        group.throughput(Throughput::Elements(*flops as u64));
        group.bench_function("fused", |b| b.iter(|| layer.fused_forward().unwrap()));
        group.bench_function("unfused", |b| b.iter(|| layer.unfused_forward().unwrap()));
        group.finish();
    }
    others(&mut criterion, &device);
    criterion.final_summary();
    compare(&mut layers);
    adapters(&device);
}
