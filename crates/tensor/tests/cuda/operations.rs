//! Every operation on the CUDA device: forward passes against the f64 reference, backward passes against the CPU's,
//! which are held against finite differences of the reference elsewhere. The kernels' own tests have the shapes that
//! reach into their corners; these prove that an operation hands its tensors to the right kernel.

use crate::{
    device,
    sample::{Pair, Sample, assert_close, assert_same, assert_same_of_terms, wide},
};
use fuselora_tensor::{
    DType, Device, Nf4Weight, Tensor, Weight,
    ops::{
        attention::{self, AttentionConfig, Rows},
        cross_entropy, elementwise, gather,
        gelu::{self, GeluKind},
        kv_cache, layer_norm,
        lora_linear::{self, Backward, Dropout, Gradients, Lora, Projection},
        optimizer::{self, AdamWHyper, AdamWParam, AdamWRate, AdamWRates},
        rms_norm,
        rope::{self, RopeTable},
        segmented_lora::{self, Segment},
        swiglu,
    },
    reference,
};
use proptest::prelude::*;

/// Large enough that short rows, whose spread may be small, have no large rstd.
const EPS: f32 = 1e-2;

pub fn float() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::BF16)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn elementwise_operations(count in 1usize..3000, at in 0usize..3000, dtype in float(), seed: u64) {
        let mut sample = Sample::new(seed, dtype);
        let (x, mut y) = (sample.activations([count]), sample.activations([count]));
        let expected: Vec<f64> = x.wide().iter().zip(y.wide()).map(|(x, y)| 0.5 * (x + y)).collect();
        elementwise::add_assign(&mut y.cuda, &x.cuda).unwrap();
        elementwise::scale(&mut y.cuda, 0.5).unwrap();
        assert_close("(x + y)/2", &y.cuda, &expected, dtype);
        for other in [DType::F32, DType::F16, DType::BF16] {
            let (found, expected) = (x.cuda.cast(other).unwrap(), x.cpu.cast(other).unwrap());
            prop_assert_eq!(found.to_bytes().unwrap(), expected.to_bytes().unwrap());
        }
        let before = wide(&y.cuda.to_f32_vec().unwrap());
        elementwise::subtract_assign(&mut y.cuda, &x.cuda).unwrap();
        let expected: Vec<f64> = before.iter().zip(x.wide()).map(|(y, x)| y - x).collect();
        assert_close("y - x", &y.cuda, &expected, dtype);
        prop_assert_eq!(elementwise::find_nonfinite(&x.cuda).unwrap(), None);
        let mut values = x.cpu.to_f32_vec().unwrap();
        values[at % count] = f32::NAN;
        let broken = Tensor::from_f32(&device(), [count], &values).unwrap().cast(dtype).unwrap();
        prop_assert_eq!(elementwise::find_nonfinite(&broken).unwrap(), Some(at % count));
    }

    #[test]
    fn activations(count in 1usize..3000, dtype in float(), seed: u64) {
        let mut sample = Sample::new(seed, dtype);
        let (gate, up, dy) = (sample.activations([count]), sample.activations([count]), sample.activations([count]));
        let act = swiglu::forward(&gate.cuda, &up.cuda).unwrap();
        assert_close("swiglu", &act, &reference::swiglu(&gate.wide(), &up.wide()), dtype);
        for (kind, expected) in [
            (GeluKind::Tanh, reference::gelu_tanh(&gate.wide())),
            (GeluKind::Erf, reference::gelu_erf(&gate.wide())),
        ] {
            assert_close("gelu", &gelu::forward(&gate.cuda, kind).unwrap(), &expected, dtype);
            let found = gelu::backward(dy.cuda.try_clone().unwrap(), &gate.cuda, kind).unwrap();
            let expected = gelu::backward(dy.cpu.try_clone().unwrap(), &gate.cpu, kind).unwrap();
            assert_same("gelu backward", &found, &expected, dtype);
        }
        let found = swiglu::backward(&dy.cuda, gate.cuda, up.cuda).unwrap();
        let expected = swiglu::backward(&dy.cpu, gate.cpu, up.cpu).unwrap();
        assert_same("dgate", &found.0, &expected.0, dtype);
        assert_same("dup", &found.1, &expected.1, dtype);
    }

    #[test]
    fn rows_by_index(rows in 1usize..40, width in 1usize..70, n in 1usize..50, dtype in float(), seed: u64) {
        let mut sample = Sample::new(seed, dtype);
        let (table, dy) = (sample.activations([rows, width]), sample.activations([n, width]));
        let (ids, mut dx) = (sample.indices(n, rows), sample.activations([rows, width]));
        let expected = gather::rows(&table.cpu, &ids.cpu).unwrap();
        let found = gather::rows(&table.cuda, &ids.cuda).unwrap();
        prop_assert_eq!(found.to_f32_vec().unwrap(), expected.to_f32_vec().unwrap());
        let found = gather::forward(&Weight::Dense(table.cuda), &ids.cuda).unwrap();
        prop_assert_eq!(found.to_f32_vec().unwrap(), expected.to_f32_vec().unwrap());
        gather::scatter_add_rows(&dy.cuda, &ids.cuda, &mut dx.cuda).unwrap();
        gather::scatter_add_rows(&dy.cpu, &ids.cpu, &mut dx.cpu).unwrap();
        assert_same("dx", &dx.cuda, &dx.cpu, dtype);
    }

    #[test]
    fn root_mean_square_norms(tokens in 1usize..20, width in 1usize..300, dtype in float(), seed: u64) {
        let mut sample = Sample::new(seed, dtype);
        let (x, delta, dy) =
            (sample.activations([tokens, width]), sample.activations([tokens, width]), sample.activations([tokens, width]));
        let (weight, mut dweight) = (sample.parameters([width]), sample.parameters([width]));
        let mut dx = sample.activations([tokens, width]);
        let (y, rstd) = rms_norm::forward(&x.cuda, &weight.cuda, EPS).unwrap();
        let expected = reference::rms_norm(&x.wide(), &weight.wide(), f64::from(EPS));
        assert_close("y", &y, &expected, dtype);
        let again = rms_norm::recompute(&x.cuda, &rstd, &weight.cuda).unwrap();
        prop_assert_eq!(again.to_bytes().unwrap(), y.to_bytes().unwrap());
        let (_, rstd_cpu) = rms_norm::forward(&x.cpu, &weight.cpu, EPS).unwrap();
        rms_norm::backward(&dy.cuda, &x.cuda, &rstd, &weight.cuda, &mut dx.cuda, Some(&mut dweight.cuda)).unwrap();
        rms_norm::backward(&dy.cpu, &x.cpu, &rstd_cpu, &weight.cpu, &mut dx.cpu, Some(&mut dweight.cpu)).unwrap();
        assert_same("rstd", &rstd, &rstd_cpu, DType::F32);
        // In short rows the two parts of the gradient may cancel.
        assert_same_of_terms("dx", &dx.cuda, &dx.cpu, 1.0, dtype);
        assert_same("dweight", &dweight.cuda, &dweight.cpu, DType::F32);
        let found = rms_norm::forward_add(&x.cuda, &delta.cuda, &weight.cuda, EPS).unwrap();
        let expected = rms_norm::forward_add(&x.cpu, &delta.cpu, &weight.cpu, EPS).unwrap();
        assert_same("sum", &found.0, &expected.0, dtype);
        assert_same("normed sum", &found.1, &expected.1, dtype);
    }

    #[test]
    fn layer_norms(tokens in 1usize..20, width in 2usize..300, dtype in float(), seed: u64) {
        let mut sample = Sample::new(seed, dtype);
        let (x, dy) = (sample.activations([tokens, width]), sample.activations([tokens, width]));
        let (weight, bias) = (sample.parameters([width]), sample.parameters([width]));
        let (mut dweight, mut dbias) = (sample.parameters([width]), sample.parameters([width]));
        let mut dx = sample.activations([tokens, width]);
        let (y, saved) = layer_norm::forward(&x.cuda, &weight.cuda, &bias.cuda, EPS).unwrap();
        let expected = reference::layer_norm(&x.wide(), &weight.wide(), &bias.wide(), f64::from(EPS));
        assert_close("y", &y, &expected, dtype);
        let again = layer_norm::recompute(&x.cuda, &saved, &weight.cuda, &bias.cuda).unwrap();
        prop_assert_eq!(again.to_bytes().unwrap(), y.to_bytes().unwrap());
        let (_, saved_cpu) = layer_norm::forward(&x.cpu, &weight.cpu, &bias.cpu, EPS).unwrap();
        let gradients = layer_norm::Gradients { weight: &mut dweight.cuda, bias: &mut dbias.cuda };
        layer_norm::backward(&dy.cuda, &x.cuda, &saved, &weight.cuda, &mut dx.cuda, Some(gradients)).unwrap();
        let gradients = layer_norm::Gradients { weight: &mut dweight.cpu, bias: &mut dbias.cpu };
        layer_norm::backward(&dy.cpu, &x.cpu, &saved_cpu, &weight.cpu, &mut dx.cpu, Some(gradients)).unwrap();
        // In short rows the two parts of the gradient may cancel.
        assert_same_of_terms("dx", &dx.cuda, &dx.cpu, 1.0, dtype);
        assert_same("dweight", &dweight.cuda, &dweight.cpu, DType::F32);
        assert_same("dbias", &dbias.cuda, &dbias.cpu, DType::F32);
    }

    #[test]
    fn rotary_positions(tokens in 1usize..30, heads in 1usize..4, half in 1usize..20, rest in 0usize..5, dtype in float(), seed: u64) {
        let mut sample = Sample::new(seed, dtype);
        let head_dim = 2 * half + rest;
        let mut x = sample.activations([tokens, heads * head_dim]);
        let positions = sample.indices(tokens, 50);
        let inv_freq: Vec<f64> = (0..half).map(|i| 10f64.powf(-(i as f64) / half as f64)).collect();
        let table = RopeTable::new(&device(), &inv_freq, 50, 1.0).unwrap();
        let expected = reference::rope(&x.wide(), head_dim, heads, &positions.cpu.to_u32_vec().unwrap(), &inv_freq);
        let before = x.wide();
        rope::apply(&mut x.cuda, heads, &positions.cuda, &table).unwrap();
        assert_close("turned", &x.cuda, &expected, dtype);
        rope::apply_inverse(&mut x.cuda, heads, &positions.cuda, &table).unwrap();
        assert_close("turned back", &x.cuda, &before, dtype);
    }

    #[test]
    fn losses(n in 1usize..8, vocab in 1usize..700, dtype in float(), seed: u64) {
        let mut sample = Sample::new(seed, dtype);
        let mut logits = sample.activations([n, vocab]);
        let targets = sample.indices(n, vocab);
        let expected = reference::cross_entropy(&logits.wide(), &targets.cpu.to_u32_vec().unwrap(), vocab);
        let mut loss = Tensor::zeros(&device(), [1], DType::F32).unwrap();
        cross_entropy::forward(&logits.cuda, &targets.cuda, &mut loss).unwrap();
        assert_close("loss", &loss, &[expected], DType::F32);
        let grad_scale = Tensor::full_f32(&device(), [1], 0.5).unwrap();
        cross_entropy::forward_backward(&mut logits.cuda, &targets.cuda, &grad_scale, &mut loss).unwrap();
        assert_close("the sum of two", &loss, &[2.0 * expected], DType::F32);
        let mut loss = Tensor::zeros(&Device::cpu(), [1], DType::F32).unwrap();
        let grad_scale = Tensor::full_f32(&Device::cpu(), [1], 0.5).unwrap();
        cross_entropy::forward_backward(&mut logits.cpu, &targets.cpu, &grad_scale, &mut loss).unwrap();
        assert_same("dlogits", &logits.cuda, &logits.cpu, dtype);
    }

    #[test]
    fn attentions(
        lengths in prop::collection::vec((1usize..20, 0usize..12), 1..3), kv_heads in 1usize..3, group in 1usize..3,
        head_dim in 1usize..24, window in prop_oneof![Just(None), (1usize..40).prop_map(Some)], seed: u64,
    ) {
        let mut sample = Sample::new(seed, DType::F32);
        let config = AttentionConfig { heads: kv_heads * group, kv_heads, head_dim, scale: 0.7, window };
        let q_lengths: Vec<usize> = lengths.iter().map(|&(queries, _)| queries).collect();
        let kv_lengths: Vec<usize> = lengths.iter().map(|&(queries, cached)| queries + cached).collect();
        let (tokens, kv_tokens): (usize, usize) = (q_lengths.iter().sum(), kv_lengths.iter().sum());
        let q = sample.activations([tokens, config.heads * head_dim]);
        let (k, v) = (sample.activations([kv_tokens, kv_heads * head_dim]), sample.activations([kv_tokens, kv_heads * head_dim]));
        let d_o = sample.activations([tokens, config.heads * head_dim]);
        let rows = |device: &Device| (Rows::new(device, &q_lengths).unwrap(), Rows::new(device, &kv_lengths).unwrap());
        let (q_rows, kv_rows) = rows(&device());
        let (o, lse) = attention::forward(&q.cuda, &k.cuda, &v.cuda, &q_rows, &kv_rows, &config).unwrap();
        let shape = reference::Attention {
            q_lengths: &q_lengths, kv_lengths: &kv_lengths, heads: config.heads, kv_heads, head_dim,
            scale: f64::from(config.scale), window,
        };
        let expected = reference::attention(&q.wide(), &k.wide(), &v.wide(), &shape);
        assert_close("o", &o, &expected.0, DType::F32);
        assert_close("lse", &lse, &expected.1, DType::F32);
        let found = attention::backward(
            &d_o.cuda, &q.cuda, &k.cuda, &v.cuda, &o, &lse, &q_rows, &kv_rows, &config).unwrap();
        let (q_rows, kv_rows) = rows(&Device::cpu());
        let (o, lse) = attention::forward(&q.cpu, &k.cpu, &v.cpu, &q_rows, &kv_rows, &config).unwrap();
        let expected = attention::backward(
            &d_o.cpu, &q.cpu, &k.cpu, &v.cpu, &o, &lse, &q_rows, &kv_rows, &config).unwrap();
        // Where a query sees one key, its score's gradient is the difference of two equal products.
        assert_same_of_terms("dq", &found.0, &expected.0, 1.0, DType::F32);
        assert_same_of_terms("dk", &found.1, &expected.1, 1.0, DType::F32);
        assert_same("dv", &found.2, &expected.2, DType::F32);
    }

    #[test]
    fn segments_of_updates(
        parts in prop::collection::vec((0usize..3, 0usize..20, 1usize..9), 1..4),
        in_features in 1usize..40, out in 1usize..60, dtype in float(), seed: u64,
    ) {
        let mut sample = Sample::new(seed, dtype);
        let tokens = parts.iter().map(|(gap, rows, _)| gap + rows).sum::<usize>() + 1;
        let (x, mut y) = (sample.activations([tokens, in_features]), sample.activations([tokens, out]));
        let mut begin = 0;
        let pairs: Vec<_> = parts.iter().map(|&(gap, rows, rank)| {
            let range = begin + gap..begin + gap + rows;
            begin = range.end;
            (range, sample.parameters([rank, in_features]), sample.parameters([out, rank]))
        }).collect();
        let segments = |side: fn(&Pair) -> &Tensor| -> Vec<Segment> {
            pairs.iter().map(|(rows, a, b)| Segment {
                rows: rows.clone(),
                lora: Lora { a: side(a), b: side(b), scaling: 0.75, dropout: None },
                transposed: None,
            }).collect()
        };
        segmented_lora::add_assign(&mut y.cuda, &x.cuda, &segments(|pair| &pair.cuda)).unwrap();
        segmented_lora::add_assign(&mut y.cpu, &x.cpu, &segments(|pair| &pair.cpu)).unwrap();
        assert_same("y", &y.cuda, &y.cpu, dtype);
    }

    #[test]
    fn lora_linears(
        tokens in 1usize..40, in_features in 1usize..40, outs in prop::collection::vec(1usize..60, 1..4), rank in 1usize..9,
        with_bias: bool, with_lora: bool, probability in prop_oneof![Just(0.0f32), 0.1f32..0.7], seed: u64,
        nf4 in prop_oneof![Just(None), any::<bool>().prop_map(Some)],
    ) {
        let mut sample = Sample::new(seed, DType::F32);
        let x = sample.activations([tokens, in_features]);
        let step = [device(), Device::cpu()].map(|device| Tensor::from_u32(&device, [1], &[7]).unwrap());
        let dropout = step.each_ref().map(|step| Some(Dropout { probability, seed, stream: 3, step }));
        let keep = reference::dropout_keep(dropout[0], tokens * in_features);
        let mut layers: Vec<Layer> =
            outs.iter().map(|&out| Layer::random(&mut sample, [out, in_features], rank, nf4)).collect();
        let options = Options { with_bias, with_lora, dropout };

        let outputs = {
            let projections: Vec<_> = layers.iter().map(|layer| layer.projection(Side::Cuda, options)).collect();
            lora_linear::forward(&x.cuda, &projections).unwrap()
        };
        let outputs_cpu = {
            let projections: Vec<_> = layers.iter().map(|layer| layer.projection(Side::Cpu, options)).collect();
            lora_linear::forward(&x.cpu, &projections).unwrap()
        };
        for (layer, output) in layers.iter().zip(&outputs) {
            let (a, b) = (layer.a.wide(), layer.b.wide());
            let lora = reference::Lora { a: &a, b: &b, rank, scaling: 0.75, keep: &keep };
            let bias = with_bias.then(|| layer.bias.wide());
            let expected = reference::lora_linear(
                &x.wide(), &layer.weight_wide(), bias.as_deref(), with_lora.then_some(&lora), in_features);
            assert_close("y", &output.y, &expected, DType::F32);
        }

        let backward = |side: Side, x: &Tensor, layers: &mut [Layer], outputs: &[lora_linear::Output]| {
            let items = layers.iter_mut().zip(outputs).map(|(layer, output)| {
                layer.backward(side, options, output)
            }).collect();
            lora_linear::backward(x, items, true).unwrap().unwrap()
        };
        let dx = backward(Side::Cuda, &x.cuda, &mut layers, &outputs);
        let dx_cpu = backward(Side::Cpu, &x.cpu, &mut layers, &outputs_cpu);
        assert_same("dx", &dx, &dx_cpu, DType::F32);
        for layer in &layers {
            assert_same("da", &layer.da.cuda, &layer.da.cpu, DType::F32);
            assert_same("db", &layer.db.cuda, &layer.db.cpu, DType::F32);
            let merged = lora_linear::merge(&layer.weight[0], &layer.a.cuda, &layer.b.cuda, 1.5).unwrap();
            let expected = lora_linear::merge(&layer.weight[1], &layer.a.cpu, &layer.b.cpu, 1.5).unwrap();
            assert_same("merged", &merged, &expected, DType::F32);
        }
    }

    #[test]
    fn optimizer_steps(sizes in prop::collection::vec(1usize..300, 1..4), max_grad_norm in prop_oneof![Just(0.0f32), 0.1f32..2.0], seed: u64) {
        let mut sample = Sample::new(seed, DType::F32);
        let mut all: Vec<[Pair; 4]> = sizes.iter().map(|&size| {
            let [p, g, m] = [(); 3].map(|()| sample.parameters([size]));
            let mut v = sample.parameters([size]);
            // A mean of squares.
            for side in [&mut v.cuda, &mut v.cpu] {
                let positive: Vec<f32> = side.to_f32_vec().unwrap().iter().map(|x| x.abs()).collect();
                *side = Tensor::from_f32(side.device(), [size], &positive).unwrap();
            }
            [p, g, m, v]
        }).collect();
        let grads: Vec<f64> = all.iter().flat_map(|[_, g, ..]| g.wide()).collect();
        let hyper = AdamWHyper { beta1: 0.9, beta2: 0.999, eps: 1e-8, max_grad_norm };
        let mut norm = Tensor::zeros(&device(), [1], DType::F32).unwrap();
        optimizer::global_norm(&all.iter().map(|[_, g, ..]| &g.cuda).collect::<Vec<_>>(), &mut norm).unwrap();
        let expected = grads.iter().map(|g| g * g).sum::<f64>().sqrt();
        assert_close("norm", &norm, &[expected], DType::F32);
        let norm_cpu = norm.to_device(&Device::cpu()).unwrap();
        for (side, norm) in [(Side::Cuda, &norm), (Side::Cpu, &norm_cpu)] {
            let mut params: Vec<_> = all.iter_mut().enumerate().map(|(rate, [p, g, m, v])| AdamWParam {
                param: side.of_mut(p), grad: side.of(g), m: side.of_mut(m), v: side.of_mut(v), rate,
            }).collect();
            let mut rates = AdamWRates::new(norm.device(), params.len()).unwrap();
            rates.set(3, &hyper, &vec![AdamWRate { lr: 1e-2, weight_decay: 0.1 }; params.len()]).unwrap();
            optimizer::adamw(&mut params, hyper, &rates, norm).unwrap();
        }
        for [p, _, m, v] in &all {
            assert_same("param", &p.cuda, &p.cpu, DType::F32);
            assert_same("m", &m.cuda, &m.cpu, DType::F32);
            assert_same("v", &v.cuda, &v.cpu, DType::F32);
        }
    }
}

#[derive(Clone, Copy)]
enum Side {
    Cuda,
    Cpu,
}

impl Side {
    fn of(self, pair: &Pair) -> &Tensor {
        match self {
            Side::Cuda => &pair.cuda,
            Side::Cpu => &pair.cpu,
        }
    }

    fn of_mut(self, pair: &mut Pair) -> &mut Tensor {
        match self {
            Side::Cuda => &mut pair.cuda,
            Side::Cpu => &mut pair.cpu,
        }
    }
}

#[derive(Clone, Copy)]
struct Options<'a> {
    with_bias: bool,
    with_lora: bool,
    /// On the CUDA device and on the CPU.
    dropout: [Option<Dropout<'a>>; 2],
}

struct Layer {
    /// On the CUDA device and on the CPU.
    weight: [Weight; 2],
    bias: Pair,
    a: Pair,
    b: Pair,
    dy: Vec<Pair>,
    da: Pair,
    db: Pair,
    out: usize,
}

impl Layer {
    /// With an NF4 weight where `nf4` says whether its statistics are nested.
    fn random(
        sample: &mut Sample,
        [out, in_features]: [usize; 2],
        rank: usize,
        nf4: Option<bool>,
    ) -> Layer {
        let weight = sample.activations([out, in_features]);
        let weight = match nf4 {
            None => [Weight::Dense(weight.cuda), Weight::Dense(weight.cpu)],
            Some(nested) => {
                let cpu = Nf4Weight::quantize(&weight.cpu, 64, nested).unwrap();
                [cpu.to_device(&device()).unwrap(), cpu].map(Weight::from)
            }
        };
        Layer {
            weight,
            bias: sample.parameters([out]),
            a: sample.parameters([rank, in_features]),
            b: sample.parameters([out, rank]),
            dy: Vec::new(),
            da: sample.parameters([rank, in_features]),
            db: sample.parameters([out, rank]),
            out,
        }
    }

    fn weight_wide(&self) -> Vec<f64> {
        wide(&self.weight[1].to_f32_vec().unwrap())
    }

    fn projection<'a>(&'a self, side: Side, options: Options<'a>) -> Projection<'a> {
        project(&self.weight, &self.bias, &self.a, &self.b, side, options)
    }

    fn backward<'a>(
        &'a mut self,
        side: Side,
        options: Options<'a>,
        output: &'a lora_linear::Output,
    ) -> Backward<'a> {
        let tokens = output.y.shape()[0];
        if self.dy.is_empty() {
            let mut sample = Sample::new(self.out as u64, DType::F32);
            self.dy.push(sample.activations([tokens, self.out]));
        }
        let Layer {
            weight,
            bias,
            a,
            b,
            dy,
            da,
            db,
            ..
        } = self;
        Backward {
            projection: project(weight, bias, a, b, side, options),
            dy: side.of(&dy[0]),
            h: output.h.as_ref(),
            gradients: options.with_lora.then(|| Gradients {
                a: side.of_mut(da),
                b: side.of_mut(db),
            }),
        }
    }
}

fn project<'a>(
    weight: &'a [Weight; 2],
    bias: &'a Pair,
    a: &'a Pair,
    b: &'a Pair,
    side: Side,
    options: Options<'a>,
) -> Projection<'a> {
    Projection {
        weight: &weight[side as usize],
        bias: options.with_bias.then_some(side.of(bias)),
        lora: options.with_lora.then_some(Lora {
            a: side.of(a),
            b: side.of(b),
            scaling: 0.75,
            dropout: options.dropout[side as usize],
        }),
    }
}

#[test]
fn the_cache_receives_rows() {
    let device = device();
    let mut cache = Tensor::zeros(&device, [4, 2], DType::F32).unwrap();
    let rows = Tensor::from_f32(&device, [2, 2], &[1.0, 2.0, 3.0, 4.0]).unwrap();
    kv_cache::append(&mut cache, 1, &rows).unwrap();
    let expected = [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0];
    assert_eq!(cache.to_f32_vec().unwrap(), expected);
}

#[test]
fn a_step_with_a_gradient_that_is_no_number_changes_nothing() {
    let tensor = |values: &[f32]| Tensor::from_f32(&device(), [2], values).unwrap();
    let (mut p, mut m, mut v) = (tensor(&[1.0, 2.0]), tensor(&[0.5; 2]), tensor(&[0.25; 2]));
    let grad = tensor(&[f32::NAN, 1.0]);
    let mut norm = Tensor::zeros(&device(), [1], DType::F32).unwrap();
    optimizer::global_norm(&[&grad], &mut norm).unwrap();
    let hyper = AdamWHyper {
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        max_grad_norm: 1.0,
    };
    let param = AdamWParam {
        param: &mut p,
        grad: &grad,
        m: &mut m,
        v: &mut v,
        rate: 0,
    };
    let mut rates = AdamWRates::new(&device(), 1).unwrap();
    let rate = AdamWRate {
        lr: 1e-2,
        weight_decay: 0.1,
    };
    rates.set(1, &hyper, &[rate]).unwrap();
    optimizer::adamw(&mut [param], hyper, &rates, &norm).unwrap();
    assert_eq!(p.to_f32_vec().unwrap(), [1.0, 2.0]);
    assert_eq!(m.to_f32_vec().unwrap(), [0.5; 2]);
    assert_eq!(v.to_f32_vec().unwrap(), [0.25; 2]);
}

#[test]
fn an_update_that_does_not_fit_is_named() {
    let zeros = |rows, columns| Tensor::zeros(&device(), [rows, columns], DType::F32).unwrap();
    let (x, weight) = (zeros(2, 4), Weight::Dense(zeros(3, 4)));
    let forward = |a: &Tensor, b: &Tensor| {
        let lora = Lora {
            a,
            b,
            scaling: 1.0,
            dropout: None,
        };
        let projection = Projection {
            weight: &weight,
            bias: None,
            lora: Some(lora),
        };
        let result = lora_linear::forward(&x, &[projection]);
        result.unwrap_err().to_string()
    };
    assert_eq!(
        forward(&zeros(2, 5), &zeros(3, 2)),
        "projection 0: lora_a: expected shape [2, 4], found [2, 5]"
    );
    assert_eq!(
        forward(&zeros(257, 4), &zeros(3, 257)),
        "rank is 257: it must be from 1 to 256"
    );
}

#[test]
fn a_type_that_the_kernel_does_not_take_is_named() {
    let f32s = Tensor::full_f32(&device(), [8], 1.0).unwrap();
    let halves = f32s.cast(DType::F16).unwrap();
    let message = swiglu::forward(&f32s, &halves).unwrap_err().to_string();
    assert_eq!(message, "up holds f16 where f32 was expected");
}

#[test]
fn an_index_beyond_the_table_is_named_before_a_kernel_reads_it() {
    let device = device();
    let table = Weight::Dense(Tensor::zeros(&device, [3, 2], DType::F32).unwrap());
    let ids = Tensor::from_u32(&device, [3], &[0, 2, 3]).unwrap();
    let message = gather::forward(&table, &ids).unwrap_err().to_string();
    assert_eq!(message, "ids: the index 3 at position 2 is not below 3");
}
