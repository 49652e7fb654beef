use super::{Backward, Dropout, Lora, Output, Projection, dequantized_bytes};
use crate::{DType, Purpose, Result, Tensor, Weight, cuda::extents};
use fuselora_kernels::{
    abi::{LORA_MAX_RANK, MatmulShape},
    lora_linear as kernel,
    matmul::{Layout, matmul},
};

const _: () = assert!(super::LARGEST_CUDA_RANK == LORA_MAX_RANK as usize);

/// The weights that are in NF4 in the type of `x`, for as long as an operation runs, where that pays.
fn dequantized(x: &Tensor, tokens: u32, weights: &[&Weight]) -> Result<Vec<Option<Tensor>>> {
    let elements = |weight: &&Weight| match weight {
        Weight::Nf4(weight) => weight.shape().iter().product::<usize>(),
        Weight::Dense(_) => 0,
    };
    let elements = weights.iter().map(elements).sum();
    let pays = dequantized_bytes(tokens as usize, x.dtype(), elements) > 0;
    let _holding = x.device().hold(Purpose::Workspace);
    let dequantize = |weight: &&Weight| match weight {
        Weight::Nf4(weight) if pays => weight.dequantize(x.dtype()).map(Some),
        _ => Ok(None),
    };
    weights.iter().map(dequantize).collect()
}

pub(super) fn forward(
    x: &Tensor,
    projections: &[Projection],
    outputs: &mut [Output],
) -> Result<()> {
    let [tokens, in_features] = activations(x)?;
    let weights: Vec<_> = projections.iter().map(|item| item.weight).collect();
    let weights = dequantized(x, tokens, &weights)?;
    let projections: Vec<_> = projections
        .iter()
        .zip(&weights)
        .map(|(projection, dequantized)| projection.operands(dequantized.as_ref()))
        .collect::<Result<_>>()?;
    let len = kernel::forward_workspace(tokens, in_features, &projections) as usize;
    let mut workspace = Tensor::workspace(x.device(), [len], DType::F32)?;
    let outputs: Vec<_> = outputs
        .iter_mut()
        .map(|Output { y, h }| kernel::Output {
            y: y.operand_mut(),
            h: h.as_mut().map(Tensor::operand_mut),
        })
        .collect();
    x.device().launch(|kernels| {
        kernel::forward(
            kernels,
            tokens,
            in_features,
            x.operand(),
            &projections,
            &outputs,
            workspace.operand_mut(),
        )
    })
}

pub(super) fn backward(
    x: &Tensor,
    items: &mut [Backward],
    need_dx: bool,
) -> Result<Option<Tensor>> {
    let [tokens, in_features] = activations(x)?;
    let weights: Vec<_> = items.iter().map(|item| item.projection.weight).collect();
    let weights = if need_dx {
        dequantized(x, tokens, &weights)?
    } else {
        weights.iter().map(|_| None).collect()
    };
    let items: Vec<_> = items
        .iter_mut()
        .zip(&weights)
        .map(|(item, dequantized)| {
            Ok(kernel::Backward {
                projection: item.projection.operands(dequantized.as_ref())?,
                dy: item.dy.operand(),
                h: item.h.map(Tensor::operand),
                gradients: item.gradients.as_mut().map(|gradients| kernel::Gradients {
                    a: gradients.a.operand_mut(),
                    b: gradients.b.operand_mut(),
                }),
            })
        })
        .collect::<Result<_>>()?;
    let len = kernel::backward_workspace(tokens, in_features, &items) as usize;
    let mut workspace = Tensor::workspace(x.device(), [len], DType::F32)?;
    let mut dx = need_dx
        .then(|| Tensor::empty(x.device(), x.shape(), x.dtype()))
        .transpose()?;
    x.device().launch(|kernels| {
        kernel::backward(
            kernels,
            tokens,
            in_features,
            x.operand(),
            &items,
            dx.as_mut().map(Tensor::operand_mut),
            workspace.operand_mut(),
        )
    })?;
    Ok(dx)
}

/// `scaling·(B·A) + W`, in F32.
pub(super) fn merge(weight: &Weight, lora: &Lora) -> Result<Tensor> {
    let (out_features, in_features) = weight.matrix("weight")?;
    let [m, n, k] = extents("weight", [out_features, in_features, lora.rank()])?;
    let mut merged = Tensor::empty(weight.device(), weight.shape(), DType::F32)?;
    weight.device().launch(|kernels| {
        let (a, b) = (lora.a.operand(), lora.b.operand());
        let shape = MatmulShape { m, n, k };
        matmul(kernels, Layout::Nn, shape, b, a, merged.operand_mut())
    })?;
    crate::ops::elementwise::scale(&mut merged, lora.scaling)?;
    let dense = match weight {
        Weight::Dense(weight) => weight.cast(DType::F32)?,
        Weight::Nf4(weight) => weight.dequantize(DType::F32)?,
    };
    crate::ops::elementwise::add_assign(&mut merged, &dense)?;
    Ok(merged)
}

pub(super) fn dropout(x: &Tensor, dropout: Dropout) -> Result<Tensor> {
    let mut y = Tensor::empty(x.device(), x.shape(), x.dtype())?;
    x.device().launch(|kernels| {
        kernel::dropout(kernels, dropout.operand(), x.operand(), y.operand_mut())
    })?;
    Ok(y)
}

fn activations(x: &Tensor) -> Result<[u32; 2]> {
    let (tokens, in_features) = x.matrix("x", "[tokens, in_features]")?;
    extents("x", [tokens, in_features])
}

impl<'a> Dropout<'a> {
    fn operand(self) -> kernel::Dropout<'a> {
        kernel::Dropout {
            probability: self.probability,
            seed: self.seed,
            stream: self.stream,
            step: self.step.operand(),
        }
    }
}

impl Projection<'_> {
    /// For a kernel, with `dequantized` in place of the weight where there is one.
    fn operands<'a>(&'a self, dequantized: Option<&'a Tensor>) -> Result<kernel::Projection<'a>> {
        let [out_features] = extents("weight", [self.weight.out_features()])?;
        let lora = self.lora.as_ref().map(|lora| {
            let [rank] = extents("lora_a", [lora.rank()])?;
            Ok(kernel::Lora {
                a: lora.a.operand(),
                b: lora.b.operand(),
                rank,
                scaling: lora.scaling,
                dropout: lora.dropout.map(Dropout::operand),
            })
        });
        Ok(kernel::Projection {
            weight: match (dequantized, self.weight) {
                (Some(weight), _) | (None, Weight::Dense(weight)) => {
                    kernel::Weight::Dense(weight.operand())
                }
                (None, Weight::Nf4(weight)) => kernel::Weight::Nf4(weight.operand()),
            },
            bias: self.bias.map(Tensor::operand),
            out_features,
            lora: lora.transpose()?,
        })
    }
}
