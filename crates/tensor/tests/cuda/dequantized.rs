//! Products with NF4 weights for few and for many tokens, which take different kernels.

use fuselora_tensor::ops::lora_linear::{Backward, Projection, backward, forward};
use fuselora_tensor::{DType, Device, Nf4Weight, Tensor, Weight, philox};

use crate::device;

/// Tokens for which weights are dequantized first, and too few for it.
const MANY: usize = 150;
const FEW: usize = 100;
const SHAPE: [usize; 2] = [96, 64];

fn values(count: usize, seed: u32) -> Vec<f32> {
    let word = |i: usize| philox::philox4x32_10([seed, 1], [i as u32, 0, 0, 0])[0];
    (0..count).map(|i| philox::uniform(word(i)) - 0.5).collect()
}

/// The first `rows` of `values`, `[rows, width]`.
fn rows(values: &[f32], rows: usize, width: usize, dtype: DType) -> Tensor {
    let tensor = Tensor::from_f32(&device(), [rows, width], &values[..rows * width]).unwrap();
    tensor.cast(dtype).unwrap()
}

/// Values are rounded to 16 bits once whichever way they go, and summed in one order.
#[test]
fn many_tokens_are_multiplied_as_few_are() {
    let [out_features, in_features] = SHAPE;
    let weight = values(out_features * in_features, 1);
    let weight = Tensor::from_f32(&Device::cpu(), SHAPE, &weight).unwrap();
    for (dtype, nested) in [(DType::BF16, true), (DType::F16, false), (DType::F32, true)] {
        let weight = Nf4Weight::quantize(&weight, 64, nested).unwrap();
        let weight = Weight::from(weight.to_device(&device()).unwrap());
        let projection = Projection {
            weight: &weight,
            bias: None,
            lora: None,
        };
        let (x, dy) = (
            values(MANY * in_features, 2),
            values(MANY * out_features, 3),
        );
        let run = |tokens: usize| {
            let x = rows(&x, tokens, in_features, dtype);
            let dy = rows(&dy, tokens, out_features, dtype);
            let y = forward(&x, &[projection]).unwrap().remove(0).y;
            let item = Backward {
                projection,
                dy: &dy,
                h: None,
                gradients: None,
            };
            let dx = backward(&x, vec![item], true).unwrap().unwrap();
            [y, dx].map(|tensor| tensor.to_f32_vec().unwrap())
        };
        for (many, few) in run(MANY).iter().zip(run(FEW)) {
            assert!(many[..few.len()] == few, "{dtype}");
        }
    }
}
