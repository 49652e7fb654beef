use crate::{
    forward::{attention_shape, float, tokens},
    sample::{
        Sample, assert_close, assert_gradient, assert_gradient_of_terms, indices, inner, norm,
        tensor, weight, wide,
    },
};
use fuselora_tensor::{
    Tensor,
    ops::{
        attention, cross_entropy, dora, gather,
        gelu::{self, GeluKind},
        layer_norm,
        lora_linear::{self, Backward, Dropout, Gradients, Lora, Projection},
        rms_norm, swiglu,
    },
    reference,
};
use proptest::prelude::*;

/// Most small, some beyond the 256 rows of a weight that are decoded at a time.
fn out_features() -> impl Strategy<Value = usize> {
    prop_oneof![2 => 1usize..60, 1 => 250usize..270]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn lora_linear_gradients(
        tokens in tokens(), in_features in 1usize..250, outs in prop::collection::vec(out_features(), 1..3), rank in 1usize..10,
        dtype in float(), probability in prop_oneof![Just(0.0f32), 0.1f32..0.7], seed: u64,
    ) {
        let mut sample = Sample::new(seed);
        let x = sample.values(tokens * in_features);
        let x_t = tensor([tokens, in_features], &x);
        let step = indices(&[2]);
        let dropout = Some(Dropout { probability, seed, stream: 1, step: &step });
        let keep = reference::dropout_keep(dropout, x.len());
        let scaling = 0.5;
        struct Layer { w: fuselora_tensor::Weight, w_exact: Vec<f64>, a: Vec<f32>, b: Vec<f32>, a_t: Tensor, b_t: Tensor, dy: Vec<f32>, dy_t: Tensor, da: Tensor, db: Tensor }
        let mut layers: Vec<_> = outs.iter().map(|&out| {
            let (w, w_exact) = weight([out, in_features], &sample.values(out * in_features), dtype);
            let (a, b, dy) = (sample.values(rank * in_features), sample.values(out * rank), sample.values(tokens * out));
            Layer {
                a_t: tensor([rank, in_features], &a), b_t: tensor([out, rank], &b), dy_t: tensor([tokens, out], &dy),
                // Gradients are added to what is there.
                da: Tensor::full_f32(x_t.device(), [rank, in_features], 1.0).unwrap(),
                db: Tensor::full_f32(x_t.device(), [out, rank], 1.0).unwrap(),
                w, w_exact, a, b, dy,
            }
        }).collect();
        let projections: Vec<_> = layers.iter().map(|layer| Projection {
            weight: &layer.w, bias: None,
            lora: Some(Lora { a: &layer.a_t, b: &layer.b_t, scaling: scaling as f32, dropout }),
        }).collect();
        let outputs = lora_linear::forward(&x_t, &projections).unwrap();
        let items = layers.iter_mut().zip(&outputs).map(|(layer, output)| Backward {
            projection: Projection {
                weight: &layer.w, bias: None,
                lora: Some(Lora { a: &layer.a_t, b: &layer.b_t, scaling: scaling as f32, dropout }),
            },
            dy: &layer.dy_t, h: output.h.as_ref(), gradients: Some(Gradients { a: &mut layer.da, b: &mut layer.db }),
        }).collect();
        let dx = lora_linear::backward(&x_t, items, true).unwrap().unwrap();
        let loss = |layer: &Layer, x: &[f64], a: &[f64], b: &[f64]| {
            let lora = reference::Lora { a, b, rank, scaling, keep: &keep };
            inner(&reference::lora_linear(x, &layer.w_exact, None, Some(&lora), in_features), &layer.dy)
        };
        assert_gradient("dx", dx.as_f32().unwrap(), &x, &mut sample, |x| {
            layers.iter().map(|layer| loss(layer, x, &wide(&layer.a), &wide(&layer.b))).sum()
        });
        for layer in &layers {
            let less_one = |t: &Tensor| t.as_f32().unwrap().iter().map(|g| g - 1.0).collect::<Vec<_>>();
            assert_gradient("da", &less_one(&layer.da), &layer.a, &mut sample, |a| loss(layer, &wide(&x), a, &wide(&layer.b)));
            assert_gradient("db", &less_one(&layer.db), &layer.b, &mut sample, |b| loss(layer, &wide(&x), &wide(&layer.a), b));
        }
    }

    #[test]
    fn norm_gradients(tokens in 1usize..40, width in 4usize..700, seed: u64) {
        let mut sample = Sample::new(seed);
        let (x, dy) = (sample.values(tokens * width), sample.values(tokens * width));
        let (weight, bias) = (sample.values(width), sample.values(width));
        let (x_t, dy_t, weight_t, bias_t) =
            (tensor([tokens, width], &x), tensor([tokens, width], &dy), tensor([width], &weight), tensor([width], &bias));
        let zeros = |t: &Tensor| tensor([t.element_count()], &vec![0.0; t.element_count()]);
        let eps = 1e-5f32;

        let mut dx = zeros(&x_t).reshape([tokens, width]).unwrap();
        let mut dweight = zeros(&weight_t);
        let (_, rstd) = rms_norm::forward(&x_t, &weight_t, eps).unwrap();
        rms_norm::backward(&dy_t, &x_t, &rstd, &weight_t, &mut dx, Some(&mut dweight)).unwrap();
        let loss = |x: &[f64], w: &[f64]| inner(&reference::rms_norm(x, w, f64::from(eps)), &dy);
        assert_gradient("rms dx", dx.as_f32().unwrap(), &x, &mut sample, |x| loss(x, &wide(&weight)));
        assert_gradient("rms dweight", dweight.as_f32().unwrap(), &weight, &mut sample, |w| loss(&wide(&x), w));
        // A second call adds.
        let once = wide(dx.as_f32().unwrap());
        rms_norm::backward(&dy_t, &x_t, &rstd, &weight_t, &mut dx, None).unwrap();
        assert_close("twice", &dx, &once.iter().map(|g| 2.0 * g).collect::<Vec<_>>());

        let mut dx = zeros(&x_t).reshape([tokens, width]).unwrap();
        let (mut dweight, mut dbias) = (zeros(&weight_t), zeros(&bias_t));
        let (_, statistics) = layer_norm::forward(&x_t, &weight_t, &bias_t, eps).unwrap();
        let gradients = layer_norm::Gradients { weight: &mut dweight, bias: &mut dbias };
        layer_norm::backward(&dy_t, &x_t, &statistics, &weight_t, &mut dx, Some(gradients)).unwrap();
        let loss = |x: &[f64], w: &[f64], b: &[f64]| inner(&reference::layer_norm(x, w, b, f64::from(eps)), &dy);
        assert_gradient("dx", dx.as_f32().unwrap(), &x, &mut sample, |x| loss(x, &wide(&weight), &wide(&bias)));
        assert_gradient("dweight", dweight.as_f32().unwrap(), &weight, &mut sample, |w| loss(&wide(&x), w, &wide(&bias)));
        assert_gradient("dbias", dbias.as_f32().unwrap(), &bias, &mut sample, |b| loss(&wide(&x), &wide(&weight), b));
    }

    #[test]
    fn attention_gradients(shape in attention_shape(), seed: u64) {
        let mut sample = Sample::new(seed);
        let inputs = shape.inputs(&mut sample);
        let (q, k, v) = (&inputs.q, &inputs.k, &inputs.v);
        let (o, lse) = attention::forward(q, k, v, &inputs.q_rows, &inputs.kv_rows, &shape.config).unwrap();
        let d_o = sample.values(o.element_count());
        let d_o_t = Tensor::from_f32(o.device(), o.shape(), &d_o).unwrap();
        let (dq, dk, dv) =
            attention::backward(&d_o_t, q, k, v, &o, &lse, &inputs.q_rows, &inputs.kv_rows, &shape.config).unwrap();
        let narrow = |t: &Tensor| t.to_f32_vec().unwrap();
        let (q, k, v) = (narrow(q), narrow(k), narrow(v));
        let loss = |q: &[f64], k: &[f64], v: &[f64]| inner(&reference::attention(q, k, v, &shape.reference()).0, &d_o);
        // A score's gradient is the difference of d_o·v and its mean, both of the order of d_o.
        let terms = norm(&wide(&d_o)) / 10.0;
        assert_gradient_of_terms("dq", &narrow(&dq), &q, terms, &mut sample, |q| loss(q, &wide(&k), &wide(&v)));
        assert_gradient_of_terms("dk", &narrow(&dk), &k, terms, &mut sample, |k| loss(&wide(&q), k, &wide(&v)));
        assert_gradient("dv", &narrow(&dv), &v, &mut sample, |v| loss(&wide(&q), &wide(&k), v));
    }

    #[test]
    fn activation_gradients(count in 1usize..20_000, spread in 0.1f32..8.0, seed: u64) {
        let mut sample = Sample::new(seed);
        let x: Vec<f32> = sample.values(count).iter().map(|x| x * spread).collect();
        let (up, dy) = (sample.values(count), sample.values(count));
        let (x_t, dy_t) = (tensor([count], &x), tensor([count], &dy));
        let (dgate, dup) = swiglu::backward(&dy_t, tensor([count], &x), tensor([count], &up)).unwrap();
        let loss = |gate: &[f64], up: &[f64]| inner(&reference::swiglu(gate, up), &dy);
        assert_gradient("dgate", dgate.as_f32().unwrap(), &x, &mut sample, |gate| loss(gate, &wide(&up)));
        assert_gradient("dup", dup.as_f32().unwrap(), &up, &mut sample, |up| loss(&wide(&x), up));
        let dx = gelu::backward(tensor([count], &dy), &x_t, GeluKind::Tanh).unwrap();
        assert_gradient("tanh", dx.as_f32().unwrap(), &x, &mut sample, |x| inner(&reference::gelu_tanh(x), &dy));
        let dx = gelu::backward(tensor([count], &dy), &x_t, GeluKind::Erf).unwrap();
        assert_gradient("erf", dx.as_f32().unwrap(), &x, &mut sample, |x| inner(&reference::gelu_erf(x), &dy));
    }

    #[test]
    fn cross_entropy_gradient(n in 1usize..10, vocab in 1usize..9000, spread in 0.1f32..10.0, seed: u64) {
        let mut sample = Sample::new(seed);
        let logits: Vec<f32> = sample.values(n * vocab).iter().map(|x| x * spread).collect();
        let targets = sample.indices(n, vocab);
        let mut gradient = tensor([n, vocab], &logits);
        let grad_scale = tensor([1], &[0.25]);
        cross_entropy::forward_backward(&mut gradient, &indices(&targets), &grad_scale, &mut tensor([1], &[0.0])).unwrap();
        assert_gradient("dlogits", gradient.as_f32().unwrap(), &logits, &mut sample, |logits| {
            0.25 * reference::cross_entropy(logits, &targets, vocab)
        });
    }

    #[test]
    fn scattered_rows_add(m in 1usize..40, width in 1usize..40, n in 0usize..60, seed: u64) {
        let mut sample = Sample::new(seed);
        let (dy, ids) = (sample.values(n * width), sample.indices(n, m));
        let mut expected = vec![9.0; m * width];
        for (i, &id) in ids.iter().enumerate() {
            for j in 0..width {
                expected[id as usize * width + j] += f64::from(dy[i * width + j]);
            }
        }
        let mut dx = Tensor::full_f32(&fuselora_tensor::Device::cpu(), [m, width], 9.0).unwrap();
        gather::scatter_add_rows(&tensor([n, width], &dy), &indices(&ids), &mut dx).unwrap();
        assert_close("dx", &dx, &expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn dora_scales_directions(
        tokens in tokens(), out in out_features(), in_features in 1usize..80, rank in 1usize..6, dtype in float(), with_bias: bool, seed: u64,
    ) {
        let mut sample = Sample::new(seed);
        let (w, w_exact) = weight([out, in_features], &sample.values(out * in_features), dtype);
        let (a, b) = (sample.values(rank * in_features), sample.values(out * rank));
        let (magnitude, bias, z, dy) = (sample.values(out), sample.values(out), sample.values(tokens * out), sample.values(tokens * out));
        let (a_t, b_t) = (tensor([rank, in_features], &a), tensor([out, rank], &b));
        let found = dora::weight_norm(&w, &a_t, &b_t, 0.5).unwrap();
        let expected: Vec<f64> = (0..out).map(|o| {
            let adapted = |i: usize| w_exact[o * in_features + i]
                + 0.5 * (0..rank).map(|r| f64::from(b[o * rank + r]) * f64::from(a[r * in_features + i])).sum::<f64>();
            (0..in_features).map(|i| adapted(i).powi(2)).sum::<f64>().sqrt()
        }).collect();
        assert_close("norm", &found, &expected);

        // Norms away from zero: the quotient is then as exact as its operands.
        let norm: Vec<f32> = sample.values(out).iter().map(|x| 1.5 + x).collect();
        let (norm_t, magnitude_t, z_t, bias_t) = (tensor([out], &norm), tensor([out], &magnitude), tensor([tokens, out], &z), tensor([out], &bias));
        let gain = dora::gain(&magnitude_t, &norm_t).unwrap();
        let gain_exact: Vec<f64> = magnitude.iter().zip(&norm).map(|(m, n)| f64::from(*m) / f64::from(*n)).collect();
        assert_close("gain", &gain, &gain_exact);
        let y = dora::forward(&z_t, &gain, with_bias.then_some(&bias_t)).unwrap();
        let expected: Vec<f64> = z.iter().enumerate()
            .map(|(i, &z)| gain_exact[i % out] * f64::from(z) + if with_bias { f64::from(bias[i % out]) } else { 0.0 }).collect();
        assert_close("y", &y, &expected);

        // Gradients are added to what is there.
        let mut d_magnitude = Tensor::full_f32(z_t.device(), [out], 1.0).unwrap();
        let dz = dora::backward(&tensor([tokens, out], &dy), &z_t, &gain, &norm_t, Some(&mut d_magnitude)).unwrap();
        let expected: Vec<f64> = dy.iter().enumerate().map(|(i, &dy)| gain_exact[i % out] * f64::from(dy)).collect();
        assert_close("dz", &dz, &expected);
        let d_magnitude = d_magnitude.to_f32_vec().unwrap();
        for (o, found) in d_magnitude.iter().enumerate() {
            let terms = |t: usize| f64::from(dy[t * out + o]) * f64::from(z[t * out + o]) / f64::from(norm[o]);
            let exact = 1.0 + (0..tokens).map(terms).sum::<f64>();
            let size = 1.0 + (0..tokens).map(|t| terms(t).abs()).sum::<f64>();
            prop_assert!((f64::from(*found) - exact).abs() < 1e-5 * size, "{found} for {exact}");
        }
    }
}
