//! The CPU operations at the shapes of a SmolLM2-135M training step on 4 x 256 tokens.
//!
//! Criterion times each operation. A table follows: the fused LoRA linear against the unfused one (three
//! products and an addition, each a call of its own), timed alternately in this run, and the share of the
//! machine's matrix-product rate that each reaches.

use criterion::{Criterion, Throughput};
use fuselora_tensor::{
    DType, Device, Tensor, Weight,
    ops::{
        attention::{self, AttentionConfig, Rows},
        cross_entropy, elementwise,
        lora_linear::{self, Backward, Gradients, Lora, Projection},
        rms_norm,
        rope::{self, RopeTable},
        swiglu,
    },
    philox,
};
use std::{
    hint::black_box,
    time::{Duration, Instant},
};

const TOKENS: usize = 1024;
const RANK: usize = 8;
const SCALING: f32 = 2.0;

fn random(device: &Device, shape: &[usize]) -> Tensor {
    let count: usize = shape.iter().product();
    let values: Vec<f32> = (0..count as u32)
        .map(|i| philox::uniform(philox::philox4x32_10([1, 2], [i, 0, 0, 0])[0]) - 0.5)
        .collect();
    Tensor::from_f32(device, shape, &values).unwrap()
}

/// A linear layer with its update, and what its backward pass needs.
struct Layer {
    name: &'static str,
    x: Tensor,
    w: Weight,
    a: Tensor,
    b: Tensor,
    dy: Tensor,
    da: Tensor,
    db: Tensor,
}

impl Layer {
    fn new(
        device: &Device,
        name: &'static str,
        tokens: usize,
        in_features: usize,
        out_features: usize,
    ) -> Layer {
        Layer {
            name,
            x: random(device, &[tokens, in_features]),
            w: Weight::Dense(random(device, &[out_features, in_features])),
            a: random(device, &[RANK, in_features]),
            b: random(device, &[out_features, RANK]),
            dy: random(device, &[tokens, out_features]),
            da: Tensor::zeros(device, [RANK, in_features], DType::F32).unwrap(),
            db: Tensor::zeros(device, [out_features, RANK], DType::F32).unwrap(),
        }
    }

    fn flops(&self) -> f64 {
        2.0 * (self.x.shape()[0] * self.w.in_features() * self.w.out_features()) as f64
    }

    fn projection(&self) -> Projection<'_> {
        Projection {
            weight: &self.w,
            bias: None,
            lora: Some(Lora {
                a: &self.a,
                b: &self.b,
                scaling: SCALING,
                dropout: None,
            }),
        }
    }

    fn fused(&self) -> Tensor {
        lora_linear::forward(&self.x, &[self.projection()])
            .unwrap()
            .remove(0)
            .y
    }

    fn unfused(&self) -> Tensor {
        let mut y = linear(&self.x, &self.w);
        let h = matmul(&self.x, &self.a);
        let mut update = matmul(&h, &self.b);
        elementwise::scale(&mut update, SCALING).unwrap();
        elementwise::add_assign(&mut y, &update).unwrap();
        y
    }

    fn backward(&mut self, h: &Tensor) -> Option<Tensor> {
        let lora = Some(Lora {
            a: &self.a,
            b: &self.b,
            scaling: SCALING,
            dropout: None,
        });
        let item = Backward {
            projection: Projection {
                weight: &self.w,
                bias: None,
                lora,
            },
            dy: &self.dy,
            h: Some(h),
            gradients: Some(Gradients {
                a: &mut self.da,
                b: &mut self.db,
            }),
        };
        lora_linear::backward(&self.x, vec![item], true).unwrap()
    }
}

fn linear(x: &Tensor, weight: &Weight) -> Tensor {
    lora_linear::forward(
        x,
        &[Projection {
            weight,
            bias: None,
            lora: None,
        }],
    )
    .unwrap()
    .remove(0)
    .y
}

/// `x · mᵀ` by the same product as the fused operation's.
fn matmul(x: &Tensor, m: &Tensor) -> Tensor {
    let (rows, columns, depth) = (x.shape()[0], m.shape()[0], m.shape()[1]);
    let mut y = Tensor::empty(x.device(), [rows, columns], DType::F32).unwrap();
    product(
        y.as_f32_mut().unwrap(),
        x.as_f32().unwrap(),
        m.as_f32().unwrap(),
        [rows, columns, depth],
    );
    y
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

fn compare(layers: &mut [Layer]) {
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
    for layer in layers {
        let h = lora_linear::forward(&layer.x, &[layer.projection()])
            .unwrap()
            .remove(0)
            .h
            .unwrap();
        let [peak, unfused, fused] = fastest([
            &mut || product(&mut y, &x, &m, [N, N, N]),
            &mut || drop(black_box(layer.unfused())),
            &mut || drop(black_box(layer.fused())),
        ]);
        let [backward] = fastest([&mut || drop(black_box(layer.backward(&h)))]);
        let peak = rate(2.0 * (N * N * N) as f64, peak);
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let share = |time: Duration| 100.0 * rate(layer.flops(), time) / peak;
        println!(
            "{:<22} | {:>10.3} | {:>8.3} | {:>5.2} | {peak:>12.0} | {:>11.0} % | {:>11.3} | {:>12.0} %",
            layer.name,
            ms(unfused),
            ms(fused),
            ms(unfused) / ms(fused),
            share(fused),
            ms(backward),
            share(backward),
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
        Layer::new(&device, "q, o      576 to   576", TOKENS, 576, 576),
        Layer::new(&device, "k, v      576 to   192", TOKENS, 576, 192),
        Layer::new(&device, "gate, up  576 to  1536", TOKENS, 576, 1536),
        Layer::new(&device, "down     1536 to   576", TOKENS, 1536, 576),
        Layer::new(&device, "1 token   576 to  1536", 1, 576, 1536),
    ];
    let mut criterion = Criterion::default()
        .without_plots()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400))
        .configure_from_args();
    for layer in &layers {
        let mut group = criterion.benchmark_group(layer.name);
        group.throughput(Throughput::Elements(layer.flops() as u64));
        group.bench_function("fused", |b| b.iter(|| layer.fused()));
        group.bench_function("unfused", |b| b.iter(|| layer.unfused()));
        group.finish();
    }
    others(&mut criterion, &device);
    criterion.final_summary();
    compare(&mut layers);
}
