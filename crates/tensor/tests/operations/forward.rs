use crate::sample::{Sample, assert_close, indices, tensor, weight, wide};
use fuselora_tensor::{
    DType, Device, Tensor, Weight,
    ops::{
        attention::{self, AttentionConfig, Rows},
        columns, cross_entropy, elementwise, gather,
        gelu::{self, GeluKind},
        kv_cache, layer_norm,
        lora_linear::{self, Dropout, Lora, Projection},
        optimizer::{self, AdamWHyper, AdamWParam, AdamWRate, AdamWRates},
        rms_norm,
        rope::{self, RopeTable},
        segmented_lora::{self, Segment, Transposed},
        swiglu,
    },
    reference,
};
use proptest::prelude::*;

pub fn float() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::BF16)]
}

/// Few tokens (row-wise products), and enough to cross the tiles of 64 and 512.
pub fn tokens() -> impl Strategy<Value = usize> {
    prop_oneof![1usize..6, 60usize..70, 500usize..530]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn lora_linear_matches(
        tokens in tokens(), in_features in 1usize..50, outs in prop::collection::vec(1usize..250, 1..3), rank in 1usize..10,
        dtype in float(), with_bias: bool, with_lora: bool, probability in prop_oneof![Just(0.0f32), 0.1f32..0.7], seed: u64,
    ) {
        let mut sample = Sample::new(seed);
        let x = sample.values(tokens * in_features);
        let step = indices(&[7]);
        let dropout = Some(Dropout { probability, seed, stream: 3, step: &step });
        let keep = reference::dropout_keep(dropout, x.len());
        let mut stored = Vec::new();
        let mut expected = Vec::new();
        for &out in &outs {
            let (w, w_exact) = weight([out, in_features], &sample.values(out * in_features), dtype);
            let (bias, a, b) = (sample.values(out), sample.values(rank * in_features), sample.values(out * rank));
            let lora = reference::Lora { a: &wide(&a), b: &wide(&b), rank, scaling: 0.75, keep: &keep };
            let bias_exact = with_bias.then(|| wide(&bias));
            expected.push(reference::lora_linear(
                &wide(&x), &w_exact, bias_exact.as_deref(), with_lora.then_some(&lora), in_features,
            ));
            stored.push((w, tensor([out], &bias), tensor([rank, in_features], &a), tensor([out, rank], &b)));
        }
        let projections: Vec<_> = stored.iter().map(|(weight, bias, a, b)| Projection {
            weight,
            bias: with_bias.then_some(bias),
            lora: with_lora.then_some(Lora { a, b, scaling: 0.75, dropout }),
        }).collect();
        let outputs = lora_linear::forward(&tensor([tokens, in_features], &x), &projections).unwrap();
        for (output, expected) in outputs.iter().zip(&expected) {
            assert_close("y", &output.y, expected);
            prop_assert_eq!(output.h.is_some(), with_lora);
        }
    }

    #[test]
    fn segments_have_their_own_updates(
        parts in prop::collection::vec(
            (0usize..3, prop_oneof![0usize..5, 9usize..40], prop_oneof![1usize..10, Just(16)]), 1..6),
        in_features in 1usize..50, out in prop_oneof![1usize..250, Just(208)], seed: u64,
    ) {
        let mut sample = Sample::new(seed);
        let tokens = parts.iter().map(|(gap, rows, _)| gap + rows).sum::<usize>() + 1;
        let (x, y) = (sample.values(tokens * in_features), sample.values(tokens * out));
        let keep = vec![1.0; tokens * in_features];
        let mut expected = wide(&y);
        let (mut begin, mut pairs) = (0, Vec::new());
        for (gap, rows, rank) in parts {
            let range = begin + gap..begin + gap + rows;
            begin = range.end;
            let (a, b) = (sample.values(rank * in_features), sample.values(out * rank));
            let lora = reference::Lora { a: &wide(&a), b: &wide(&b), rank, scaling: 0.75, keep: &keep };
            let own = wide(&x[range.start * in_features..range.end * in_features]);
            let update = reference::lora_linear(&own, &vec![0.0; out * in_features], None, Some(&lora), in_features);
            for (y, update) in expected[range.start * out..range.end * out].iter_mut().zip(&update) {
                *y += update;
            }
            let turned = |values: &[f32], rows: usize, columns: usize| -> Tensor {
                let values: Vec<f32> = (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect();
                tensor([columns, rows], &values)
            };
            let turned = [turned(&a, rank, in_features), turned(&b, out, rank)];
            pairs.push((range, tensor([rank, in_features], &a), tensor([out, rank], &b), turned));
        }
        for with_turned in [false, true] {
            let segments: Vec<_> = pairs.iter().map(|(rows, a, b, turned)| Segment {
                rows: rows.clone(),
                lora: Lora { a, b, scaling: 0.75, dropout: None },
                transposed: with_turned.then_some(Transposed { a: &turned[0], b: &turned[1] }),
            }).collect();
            let mut found = tensor([tokens, out], &y);
            segmented_lora::add_assign(&mut found, &tensor([tokens, in_features], &x), &segments).unwrap();
            assert_close("y", &found, &expected);
        }
    }

    #[test]
    fn merge_is_the_layer(out in 1usize..210, in_features in 1usize..40, rank in 1usize..6, dtype in float(), seed: u64) {
        let mut sample = Sample::new(seed);
        let (w, w_exact) = weight([out, in_features], &sample.values(out * in_features), dtype);
        let (a, b) = (sample.values(rank * in_features), sample.values(out * rank));
        let merged = lora_linear::merge(&w, &tensor([rank, in_features], &a), &tensor([out, rank], &b), 1.5).unwrap();
        // The layer of the identity is its weight, transposed.
        let mut expected = w_exact;
        for o in 0..out {
            for i in 0..in_features {
                let update: f64 = (0..rank).map(|r| f64::from(b[o * rank + r]) * f64::from(a[r * in_features + i])).sum();
                expected[o * in_features + i] += 1.5 * update;
            }
        }
        assert_close("merged", &merged, &expected);
    }

    #[test]
    fn norms_match(tokens in 1usize..40, width in 1usize..700, seed: u64) {
        let mut sample = Sample::new(seed);
        let (x, delta) = (sample.values(tokens * width), sample.values(tokens * width));
        let (weight, bias) = (sample.values(width), sample.values(width));
        let sum: Vec<f32> = x.iter().zip(&delta).map(|(x, d)| x + d).collect();
        let (x_t, delta_t) = (tensor([tokens, width], &x), tensor([tokens, width], &delta));
        let (weight_t, bias_t) = (tensor([width], &weight), tensor([width], &bias));
        let eps = 1e-5f32;
        let expected = reference::rms_norm(&wide(&x), &wide(&weight), f64::from(eps));
        let (y, rstd) = rms_norm::forward(&x_t, &weight_t, eps).unwrap();
        assert_close("y", &y, &expected);
        assert_close("recomputed", &rms_norm::recompute(&x_t, &rstd, &weight_t).unwrap(), &expected);
        let (sum_t, y, _) = rms_norm::forward_add(&x_t, &delta_t, &weight_t, eps).unwrap();
        prop_assert_eq!(sum_t.as_f32().unwrap(), &sum[..]);
        assert_close("y of the sum", &y, &reference::rms_norm(&wide(&sum), &wide(&weight), f64::from(eps)));

        let exact = |x: &[f32]| reference::layer_norm(&wide(x), &wide(&weight), &wide(&bias), f64::from(eps));
        if width > 3 {
            let (y, statistics) = layer_norm::forward(&x_t, &weight_t, &bias_t, eps).unwrap();
            assert_close("layer norm", &y, &exact(&x));
            let again = layer_norm::recompute(&x_t, &statistics, &weight_t, &bias_t).unwrap();
            assert_close("layer norm recomputed", &again, &exact(&x));
            let (_, y, _) = layer_norm::forward_add(&x_t, &delta_t, &weight_t, &bias_t, eps).unwrap();
            assert_close("layer norm of the sum", &y, &exact(&sum));
        }
    }

    #[test]
    fn rope_matches_and_inverts(tokens in 1usize..50, heads in 1usize..6, half in 1usize..40, rest in 0usize..5, seed: u64) {
        let mut sample = Sample::new(seed);
        let head_dim = 2 * half + rest;
        let x = sample.values(tokens * heads * head_dim);
        let positions = sample.indices(tokens, 300);
        let inv_freq: Vec<f64> = (0..half).map(|i| 10_000f64.powf(-(i as f64) / half as f64)).collect();
        let table = RopeTable::new(&Device::cpu(), &inv_freq, 300, 1.0).unwrap();
        let mut turned = tensor([tokens, heads * head_dim], &x);
        rope::apply(&mut turned, heads, &indices(&positions), &table).unwrap();
        assert_close("turned", &turned, &reference::rope(&wide(&x), head_dim, heads, &positions, &inv_freq));
        rope::apply_inverse(&mut turned, heads, &indices(&positions), &table).unwrap();
        assert_close("turned back", &turned, &wide(&x));
    }

    #[test]
    fn attention_matches(shape in attention_shape(), seed: u64) {
        let mut sample = Sample::new(seed);
        let inputs = shape.inputs(&mut sample);
        let (o, lse) = attention::forward(
            &inputs.q, &inputs.k, &inputs.v, &inputs.q_rows, &inputs.kv_rows, &shape.config,
        ).unwrap();
        let exact = |x: &Tensor| wide(x.as_f32().unwrap());
        let (o_exact, lse_exact) =
            reference::attention(&exact(&inputs.q), &exact(&inputs.k), &exact(&inputs.v), &shape.reference());
        assert_close("o", &o, &o_exact);
        assert_close("lse", &lse, &lse_exact);
    }

    #[test]
    fn activations_match(count in 1usize..20_000, spread in 0.1f32..12.0, seed: u64) {
        let mut sample = Sample::new(seed);
        let x: Vec<f32> = sample.values(count).iter().map(|x| x * spread).collect();
        let up = sample.values(count);
        let (x_t, up_t) = (tensor([count], &x), tensor([count], &up));
        assert_close("swiglu", &swiglu::forward(&x_t, &up_t).unwrap(), &reference::swiglu(&wide(&x), &wide(&up)));
        assert_close("tanh", &gelu::forward(&x_t, GeluKind::Tanh).unwrap(), &reference::gelu_tanh(&wide(&x)));
        assert_close("erf", &gelu::forward(&x_t, GeluKind::Erf).unwrap(), &reference::gelu_erf(&wide(&x)));
    }

    #[test]
    fn cross_entropy_matches(n in 0usize..20, vocab in 1usize..9000, spread in 0.1f32..30.0, seed: u64) {
        let mut sample = Sample::new(seed);
        let logits: Vec<f32> = sample.values(n * vocab).iter().map(|x| x * spread).collect();
        let targets = sample.indices(n, vocab);
        let expected = reference::cross_entropy(&wide(&logits), &targets, vocab);
        let mut logits = tensor([n, vocab], &logits);
        let mut loss = tensor([1], &[0.0]);
        cross_entropy::forward(&logits, &indices(&targets), &mut loss).unwrap();
        let found = f64::from(loss.as_f32().unwrap()[0]);
        prop_assert!((found - expected).abs() <= 2e-5 * expected.abs().max(0.1), "{found} {expected}");
        // The second sum is added to the first.
        cross_entropy::forward_backward(&mut logits, &indices(&targets), &tensor([1], &[1.0]), &mut loss).unwrap();
        let found = f64::from(loss.as_f32().unwrap()[0]) / 2.0;
        prop_assert!((found - expected).abs() <= 2e-5 * expected.abs().max(0.1), "{found} {expected}");
    }

    #[test]
    fn gathered_rows_are_the_rows(rows in 1usize..60, width in 1usize..50, n in 0usize..80, dtype in float(), seed: u64) {
        let mut sample = Sample::new(seed);
        let (table, exact) = weight([rows, width], &sample.values(rows * width), dtype);
        let ids = sample.indices(n, rows);
        let expected: Vec<f64> = ids.iter().flat_map(|&id| exact[id as usize * width..][..width].to_vec()).collect();
        let found = gather::forward(&table, &indices(&ids)).unwrap();
        prop_assert_eq!(wide(found.as_f32().unwrap()), expected.clone());
        let plain = Tensor::from_f32(&Device::cpu(), [rows, width], &table.to_f32_vec().unwrap()).unwrap();
        let found = gather::rows(&plain, &indices(&ids)).unwrap();
        prop_assert_eq!(wide(found.as_f32().unwrap()), expected);
    }

    #[test]
    fn adamw_matches(count in 1usize..20_000, steps in 1u64..5, seed: u64) {
        let mut sample = Sample::new(seed);
        let param = sample.values(count);
        let mut exact: Vec<_> =
            wide(&param).into_iter().map(|param| reference::AdamWState { param, m: 0.0, v: 0.0 }).collect();
        let (mut p, mut m, mut v) =
            (tensor([count], &param), tensor([count], &vec![0.0; count]), tensor([count], &vec![0.0; count]));
        for step in 1..=steps {
            let grad = sample.values(count);
            for (state, &grad) in exact.iter_mut().zip(&grad) {
                *state = reference::adamw(*state, 0.5 * f64::from(grad), 1e-2, (0.9, 0.999), 1e-8, 0.1, step as i32);
            }
            // A norm of twice the largest: gradients are halved.
            let hyper = AdamWHyper { beta1: 0.9, beta2: 0.999, eps: 1e-8, max_grad_norm: 100.0 };
            let grad = tensor([count], &grad);
            let param = AdamWParam { param: &mut p, grad: &grad, m: &mut m, v: &mut v, rate: 0 };
            let mut rates = AdamWRates::new(&Device::cpu(), 1).unwrap();
            rates.set(step, &hyper, &[AdamWRate { lr: 1e-2, weight_decay: 0.1 }]).unwrap();
            optimizer::adamw(&mut [param], hyper, &rates, &tensor([1], &[200.0])).unwrap();
        }
        assert_close("param", &p, &exact.iter().map(|s| s.param).collect::<Vec<_>>());
        assert_close("m", &m, &exact.iter().map(|s| s.m).collect::<Vec<_>>());
        assert_close("v", &v, &exact.iter().map(|s| s.v).collect::<Vec<_>>());
    }

    #[test]
    fn elementwise_matches(count in 1usize..50_000, at in 0usize..50_000, seed: u64) {
        let mut sample = Sample::new(seed);
        let (x, y) = (sample.values(count), sample.values(count));
        let mut sum = tensor([count], &y);
        elementwise::add_assign(&mut sum, &tensor([count], &x)).unwrap();
        elementwise::scale(&mut sum, 3.0).unwrap();
        let expected: Vec<f64> = x.iter().zip(&y).map(|(&x, &y)| 3.0 * (f64::from(x) + f64::from(y))).collect();
        assert_close("3(x + y)", &sum, &expected);
        let mut norm = tensor([1], &[0.0]);
        optimizer::global_norm(&[&sum, &tensor([count], &x)], &mut norm).unwrap();
        let norm = f64::from(norm.as_f32().unwrap()[0]);
        let expected = expected.iter().chain(&wide(&x)).map(|x| x * x).sum::<f64>().sqrt();
        prop_assert!((norm / expected - 1.0).abs() < 1e-6);
        prop_assert_eq!(elementwise::find_nonfinite(&sum).unwrap(), None);
        let at = at % count;
        sum.as_f32_mut().unwrap()[at] = if seed % 2 == 0 { f32::NAN } else { f32::NEG_INFINITY };
        sum.as_f32_mut().unwrap()[count - 1] = f32::INFINITY;
        prop_assert_eq!(elementwise::find_nonfinite(&sum).unwrap(), Some(at));
    }
}

#[derive(Debug, Clone)]
pub struct AttentionShape {
    q_lengths: Vec<usize>,
    kv_lengths: Vec<usize>,
    /// Rows of k and v that no sequence counts.
    spare: usize,
    pub config: AttentionConfig,
}

pub struct AttentionInputs {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub q_rows: Rows,
    pub kv_rows: Rows,
}

/// Sequences that cross the blocks of 64 queries and 256 keys, with and without a cache and a window.
pub fn attention_shape() -> impl Strategy<Value = AttentionShape> {
    let length = prop_oneof![4 => 0usize..40, 2 => 60usize..140, 1 => 250usize..330];
    let cached = prop_oneof![Just(0usize), 1usize..300];
    (
        prop::collection::vec((length, cached), 1..4).prop_filter("no token", |sequences| {
            sequences.iter().any(|&(length, _)| length > 0)
        }),
        (1usize..3, 1usize..4, 1usize..20),
        prop_oneof![Just(None), (1usize..300).prop_map(Some)],
        0usize..3,
    )
        .prop_map(
            |(lengths, (kv_heads, group, head_dim), window, spare)| AttentionShape {
                q_lengths: lengths.iter().map(|&(queries, _)| queries).collect(),
                kv_lengths: lengths
                    .iter()
                    .map(|&(queries, cached)| queries + cached)
                    .collect(),
                spare,
                config: AttentionConfig {
                    heads: kv_heads * group,
                    kv_heads,
                    head_dim,
                    scale: 1.3,
                    window,
                },
            },
        )
}

impl AttentionShape {
    pub fn inputs(&self, sample: &mut Sample) -> AttentionInputs {
        let AttentionConfig {
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.config;
        let tokens: usize = self.q_lengths.iter().sum();
        let kv_tokens = self.kv_lengths.iter().sum::<usize>() + self.spare;
        let mut random = |rows: usize, heads: usize| {
            tensor(
                [rows, heads * head_dim],
                &sample.values(rows * heads * head_dim),
            )
        };
        AttentionInputs {
            q: random(tokens, heads),
            k: random(kv_tokens, kv_heads),
            v: random(kv_tokens, kv_heads),
            q_rows: Rows::new(&Device::cpu(), &self.q_lengths).unwrap(),
            kv_rows: Rows::new(&Device::cpu(), &self.kv_lengths).unwrap(),
        }
    }

    pub fn reference(&self) -> reference::Attention<'_> {
        let AttentionConfig {
            heads,
            kv_heads,
            head_dim,
            scale,
            window,
        } = self.config;
        let (q_lengths, kv_lengths) = (&self.q_lengths[..], &self.kv_lengths[..]);
        reference::Attention {
            q_lengths,
            kv_lengths,
            heads,
            kv_heads,
            head_dim,
            scale: f64::from(scale),
            window,
        }
    }
}

#[test]
fn the_cache_receives_rows() {
    let mut cache = tensor([4, 2], &[0.0; 8]);
    kv_cache::append(&mut cache, 1, &tensor([2, 2], &[1.0, 2.0, 3.0, 4.0])).unwrap();
    assert_eq!(
        cache.as_f32().unwrap(),
        [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0]
    );
}

#[test]
fn a_step_with_a_gradient_that_is_no_number_changes_nothing() {
    let (mut p, mut m, mut v) = (
        tensor([2], &[1.0, 2.0]),
        tensor([2], &[0.5; 2]),
        tensor([2], &[0.25; 2]),
    );
    let grad = tensor([2], &[f32::NAN, 1.0]);
    let mut norm = tensor([1], &[0.0]);
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
    let mut rates = AdamWRates::new(&Device::cpu(), 1).unwrap();
    let rate = AdamWRate {
        lr: 1e-2,
        weight_decay: 0.1,
    };
    rates.set(1, &hyper, &[rate]).unwrap();
    optimizer::adamw(&mut [param], hyper, &rates, &norm).unwrap();
    assert_eq!(p.as_f32().unwrap(), [1.0, 2.0]);
    assert_eq!(m.as_f32().unwrap(), [0.5; 2]);
    assert_eq!(v.as_f32().unwrap(), [0.25; 2]);
}

#[test]
fn two_runs_agree_to_the_bit() {
    let mut sample = Sample::new(1);
    let x = tensor([300, 70], &sample.values(300 * 70));
    let w = Weight::Dense(tensor([90, 70], &sample.values(90 * 70)));
    let (a, b) = (
        tensor([8, 70], &sample.values(560)),
        tensor([90, 8], &sample.values(720)),
    );
    let lora = Some(Lora {
        a: &a,
        b: &b,
        scaling: 2.0,
        dropout: None,
    });
    let run = || {
        let y = lora_linear::forward(
            &x,
            &[Projection {
                weight: &w,
                bias: None,
                lora,
            }],
        )
        .unwrap()
        .remove(0)
        .y;
        y.to_bytes().unwrap()
    };
    assert_eq!(run(), run());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn columns_are_split_and_joined(rows in 1usize..700, widths in prop::array::uniform3(0usize..60), seed: u64) {
        let total: usize = widths.iter().sum();
        let values = Sample::new(seed).values(rows * total);
        let parts = columns::split(&tensor([rows, total], &values), widths).unwrap();
        let mut first = 0;
        for (part, width) in parts.iter().zip(widths) {
            let expected: Vec<f32> = (0..rows).flat_map(|row| &values[row * total + first..][..width]).copied().collect();
            prop_assert_eq!(part.as_f32().unwrap(), &expected[..]);
            first += width;
        }
        let joined = columns::join(parts.each_ref()).unwrap();
        prop_assert_eq!(joined.as_f32().unwrap(), &values[..]);
    }
}
