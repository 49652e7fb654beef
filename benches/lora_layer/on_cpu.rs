//! One linear layer with its low-rank update on the CPU device: fused, and as PEFT computes it, operation by operation.
#![allow(dead_code, reason = "each program uses its own part")]

use fuselora_tensor::ops::{
    elementwise::{add_assign, scale},
    linear_gradients,
    lora_linear::{self, Backward, Gradients, Lora, Projection},
};
use fuselora_tensor::{DType, Device, Result, Tensor, Weight, philox};

/// The tensors of a layer, all F32: `x [tokens, in_features]`, a weight `[out_features, in_features]`, an update.
pub struct Layer {
    pub x: Tensor,
    pub weight: Weight,
    a: Weight,
    b: Weight,
    dy: Tensor,
    da: Tensor,
    db: Tensor,
}

const SCALING: f32 = 2.0;

impl Layer {
    /// Random tensors.
    pub fn new(
        device: &Device,
        [tokens, in_features, out_features, rank]: [usize; 4],
    ) -> Result<Layer> {
        let weight = |rows, columns| random(device, &[rows, columns]).map(Weight::Dense);
        let zeros = |rows, columns| Tensor::zeros(device, [rows, columns], DType::F32);
        Ok(Layer {
            x: random(device, &[tokens, in_features])?,
            weight: weight(out_features, in_features)?,
            a: weight(rank, in_features)?,
            b: weight(out_features, rank)?,
            dy: random(device, &[tokens, out_features])?,
            da: zeros(rank, in_features)?,
            db: zeros(out_features, rank)?,
        })
    }

    /// The layer as `lora_linear` takes it.
    pub fn projection(&self) -> Projection<'_> {
        projection(&self.weight, Some([&self.a, &self.b]))
    }

    /// `y = x·Wᵀ + scaling·(x·Aᵀ)·Bᵀ`, and `h = x·Aᵀ`, in one operation.
    pub fn fused_forward(&self) -> Result<[Tensor; 2]> {
        let output = lora_linear::forward(&self.x, &[self.projection()])?.remove(0);
        Ok([output.y, output.h.expect("the layer has an update")])
    }

    /// The same in three products, a scale and an add.
    pub fn unfused_forward(&self) -> Result<[Tensor; 2]> {
        let mut y = linear(&self.x, &self.weight)?;
        let h = linear(&self.x, &self.a)?;
        let mut update = linear(&h, &self.b)?;
        scale(&mut update, SCALING)?;
        add_assign(&mut y, &update)?;
        Ok([y, h])
    }

    /// `dx`, while the gradients of the update are added up, in one operation.
    pub fn fused_backward(&mut self, h: &Tensor) -> Result<Tensor> {
        let item = Backward {
            projection: projection(&self.weight, Some([&self.a, &self.b])),
            dy: &self.dy,
            h: Some(h),
            gradients: Some(Gradients {
                a: &mut self.da,
                b: &mut self.db,
            }),
        };
        let dx = lora_linear::backward(&self.x, vec![item], true)?;
        Ok(dx.expect("it was asked for"))
    }

    /// The same in five products, a scale and an add.
    pub fn unfused_backward(&mut self, h: &Tensor) -> Result<Tensor> {
        let mut dx = linear_backward(&self.x, &self.weight, &self.dy)?;
        let mut dy = self.dy.try_clone()?;
        scale(&mut dy, SCALING)?;
        linear_gradients::weight(&dy, h, &mut self.db)?;
        let dh = linear_backward(h, &self.b, &dy)?;
        linear_gradients::weight(&dh, &self.x, &mut self.da)?;
        add_assign(&mut dx, &linear_backward(&self.x, &self.a, &dh)?)?;
        Ok(dx)
    }
}

/// Random numbers in [-0.5, 0.5).
pub fn random(device: &Device, shape: &[usize]) -> Result<Tensor> {
    let count: usize = shape.iter().product();
    let values: Vec<f32> = (0..count as u32)
        .map(|i| philox::uniform(philox::philox4x32_10([1, 2], [i, 0, 0, 0])[0]) - 0.5)
        .collect();
    Tensor::from_f32(device, shape, &values)
}

/// `x·Wᵀ`
pub fn linear(x: &Tensor, weight: &Weight) -> Result<Tensor> {
    Ok(lora_linear::forward(x, &[projection(weight, None)])?
        .remove(0)
        .y)
}

/// `dy·W`
pub fn linear_backward(x: &Tensor, weight: &Weight, dy: &Tensor) -> Result<Tensor> {
    let item = Backward {
        projection: projection(weight, None),
        dy,
        h: None,
        gradients: None,
    };
    let dx = lora_linear::backward(x, vec![item], true)?;
    Ok(dx.expect("it was asked for"))
}

fn projection<'a>(weight: &'a Weight, update: Option<[&'a Weight; 2]>) -> Projection<'a> {
    let dense = |factor: &'a Weight| factor.dense().expect("factors are dense");
    Projection {
        weight,
        bias: None,
        lora: update.map(|[a, b]| Lora {
            a: dense(a),
            b: dense(b),
            scaling: SCALING,
            dropout: None,
        }),
    }
}
