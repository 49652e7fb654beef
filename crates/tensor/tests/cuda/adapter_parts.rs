//! What adapters have besides low-rank updates of projections: magnitudes, weights and biases that are trained whole,
//! updates of embeddings, dropout before a frozen weight; and the parts of a fused projection. On the CUDA device
//! against the CPU, which is held against the f64 reference, finite differences and PEFT elsewhere.

use crate::{
    device,
    operations::float,
    sample::{Sample, assert_same, assert_same_of_terms},
};
use fuselora_tensor::{
    DType, Nf4Weight, Weight,
    ops::{
        columns, dora, linear_gradients,
        lora_embedding::{self, Update},
        lora_linear::{self, Dropout},
    },
};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn blocks_of_columns(
        rows in 1usize..20, widths in prop::array::uniform3(0usize..40), n in 1usize..20, dtype in float(), seed: u64,
    ) {
        let mut sample = Sample::new(seed, dtype);
        let x = sample.activations([rows, widths.iter().sum::<usize>() + 1]);
        let widths = [widths[0], widths[1], widths[2] + 1];
        let found = columns::split(&x.cuda, widths).unwrap();
        let expected = columns::split(&x.cpu, widths).unwrap();
        for (found, expected) in found.iter().zip(&expected) {
            prop_assert_eq!(found.to_f32_vec().unwrap(), expected.to_f32_vec().unwrap());
        }
        let joined = columns::join(found.each_ref()).unwrap();
        prop_assert_eq!(joined.to_bytes().unwrap(), x.cuda.to_bytes().unwrap());
        let ids = sample.indices(n, widths.iter().sum());
        let found = columns::take(&x.cuda, &ids.cuda).unwrap();
        let expected = columns::take(&x.cpu, &ids.cpu).unwrap();
        prop_assert_eq!(found.to_f32_vec().unwrap(), expected.to_f32_vec().unwrap());
    }

    #[test]
    fn directions_and_magnitudes(
        tokens in 1usize..20, out in 1usize..60, in_features in 1usize..50, rank in 1usize..20, nf4: bool,
        with_bias: bool, dtype in float(), seed: u64,
    ) {
        let mut sample = Sample::new(seed, dtype);
        let weight = sample.activations([out, in_features]);
        let (a, b) = (sample.parameters([rank, in_features]), sample.parameters([out, rank]));
        let bias = sample.parameters([out]);
        let (on_cuda, on_cpu): (Weight, Weight) = if nf4 {
            let quantized = Nf4Weight::quantize(&weight.cpu, 32, true).unwrap();
            (quantized.to_device(&device()).unwrap().into(), quantized.into())
        } else {
            (Weight::Dense(weight.cuda), Weight::Dense(weight.cpu))
        };
        let norm = dora::weight_norm(&on_cuda, &a.cuda, &b.cuda, 0.7).unwrap();
        let norm_cpu = dora::weight_norm(&on_cpu, &a.cpu, &b.cpu, 0.7).unwrap();
        assert_same("norm", &norm, &norm_cpu, DType::F32);
        let magnitude = sample.parameters([out]);
        let gain = dora::gain(&magnitude.cuda, &norm).unwrap();
        let gain_cpu = dora::gain(&magnitude.cpu, &norm_cpu).unwrap();
        assert_same("gain", &gain, &gain_cpu, DType::F32);
        let mut merged = sample.parameters([out, in_features]);
        dora::scale_rows(&mut merged.cuda, &gain).unwrap();
        dora::scale_rows(&mut merged.cpu, &gain_cpu).unwrap();
        assert_same("merged", &merged.cuda, &merged.cpu, DType::F32);
        let (z, dy) = (sample.activations([tokens, out]), sample.activations([tokens, out]));
        let found = dora::forward(&z.cuda, &gain, with_bias.then_some(&bias.cuda)).unwrap();
        let expected = dora::forward(&z.cpu, &gain_cpu, with_bias.then_some(&bias.cpu)).unwrap();
        assert_same_of_terms("y", &found, &expected, 1.0, dtype);
        let mut dmagnitude = sample.parameters([out]);
        let found = dora::backward(&dy.cuda, &z.cuda, &gain, &norm, Some(&mut dmagnitude.cuda)).unwrap();
        let expected = dora::backward(&dy.cpu, &z.cpu, &gain_cpu, &norm_cpu, Some(&mut dmagnitude.cpu)).unwrap();
        assert_same("dz", &found, &expected, dtype);
        assert_same_of_terms("dmagnitude", &dmagnitude.cuda, &dmagnitude.cpu, tokens as f64, DType::F32);
        let found = dora::backward(&dy.cuda, &z.cuda, &gain, &norm, None).unwrap();
        assert_same("dz alone", &found, &expected, dtype);
    }

    #[test]
    fn gradients_of_whole_layers(
        tokens in 1usize..40, out in 1usize..60, in_features in 1usize..50, dtype in float(), seed: u64,
    ) {
        let mut sample = Sample::new(seed, dtype);
        let (dy, x) = (sample.activations([tokens, out]), sample.activations([tokens, in_features]));
        let (mut dw, mut db) = (sample.parameters([out, in_features]), sample.parameters([out]));
        linear_gradients::weight(&dy.cuda, &x.cuda, &mut dw.cuda).unwrap();
        linear_gradients::weight(&dy.cpu, &x.cpu, &mut dw.cpu).unwrap();
        assert_same_of_terms("dw", &dw.cuda, &dw.cpu, tokens as f64, DType::F32);
        linear_gradients::bias(&dy.cuda, 0.7, &mut db.cuda).unwrap();
        linear_gradients::bias(&dy.cpu, 0.7, &mut db.cpu).unwrap();
        assert_same_of_terms("db", &db.cuda, &db.cpu, tokens as f64, DType::F32);
    }

    #[test]
    fn updates_of_embeddings(
        n in 1usize..30, known in 1usize..30, width in 1usize..50, rank in 1usize..20, dtype in float(), seed: u64,
    ) {
        let mut sample = Sample::new(seed, dtype);
        let (a, b) = (sample.parameters([rank, known]), sample.parameters([width, rank]));
        let ids = sample.indices(n, known);
        let (mut y, dy) = (sample.activations([n, width]), sample.activations([n, width]));
        let cuda = Update { a: &a.cuda, b: &b.cuda, scaling: 0.7 };
        let cpu = Update { a: &a.cpu, b: &b.cpu, scaling: 0.7 };
        let h = lora_embedding::forward(&ids.cuda, cuda, &mut y.cuda).unwrap();
        let h_cpu = lora_embedding::forward(&ids.cpu, cpu, &mut y.cpu).unwrap();
        prop_assert_eq!(h.to_f32_vec().unwrap(), h_cpu.to_f32_vec().unwrap());
        // The update is rounded to the storage type before it is added.
        assert_same_of_terms("y", &y.cuda, &y.cpu, 1.0, dtype);
        let (mut da, mut db) = (sample.parameters([rank, known]), sample.parameters([width, rank]));
        lora_embedding::backward(&dy.cuda, &ids.cuda, cuda, &h, &mut da.cuda, &mut db.cuda).unwrap();
        lora_embedding::backward(&dy.cpu, &ids.cpu, cpu, &h_cpu, &mut da.cpu, &mut db.cpu).unwrap();
        assert_same_of_terms("da", &da.cuda, &da.cpu, width as f64, DType::F32);
        assert_same_of_terms("db", &db.cuda, &db.cpu, n as f64, DType::F32);
    }

    #[test]
    fn dropout_in_memory(count in 1usize..3000, probability in 0.1f32..0.9, dtype in float(), seed: u64) {
        let mut sample = Sample::new(seed, dtype);
        let x = sample.activations([1, count]);
        let step = sample.indices(1, 100);
        let on = |step| Dropout { probability, seed, stream: 2, step };
        let found = lora_linear::dropout(&x.cuda, on(&step.cuda)).unwrap();
        let expected = lora_linear::dropout(&x.cpu, on(&step.cpu)).unwrap();
        assert_same("drop(x)", &found, &expected, dtype);
    }
}
