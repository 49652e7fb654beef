//! A frozen linear layer with its low-rank update as one operation (Hu et al., "LoRA", 2021):
//! `y = x·Wᵀ + bias + scaling · drop(x)·Aᵀ·Bᵀ`.
//!
//! Projections that read the same `x` (query, key and value; gate and up) are one call: `x` is read once, and
//! `dx` is written once. The low-rank update is added to each tile of `y` while the tile is in the cache.

mod backward;
#[cfg(feature = "cuda")]
mod cuda;
mod dropout;
mod forward;

pub use dropout::Dropout;

use crate::{DType, Error, Result, Tensor, Weight, parallel};
use rayon::prelude::*;

/// The highest rank that a CUDA device takes; the CPU takes any.
pub const LARGEST_CUDA_RANK: usize = 256;

/// One linear layer.
#[derive(Clone, Copy)]
pub struct Projection<'a> {
    /// The frozen weight, `[out, in]`.
    pub weight: &'a Weight,
    /// Added to each row of the output, `[out]` F32.
    pub bias: Option<&'a Tensor>,
    /// The low-rank update.
    pub lora: Option<Lora<'a>>,
}

/// A low-rank update `scaling·B·A` of a weight.
#[derive(Clone, Copy)]
pub struct Lora<'a> {
    /// The down-projection, `[rank, in]` F32.
    pub a: &'a Tensor,
    /// The up-projection, `[out, rank]` F32.
    pub b: &'a Tensor,
    /// `alpha/rank`, or `alpha/√rank` for rsLoRA.
    pub scaling: f32,
    /// Dropout of the update's input.
    pub dropout: Option<Dropout<'a>>,
}

/// The result of one projection.
#[derive(Debug)]
pub struct Output {
    /// `[tokens, out]`.
    pub y: Tensor,
    /// `drop(x)·Aᵀ`, unscaled, `[tokens, rank]`: the backward pass needs it.
    pub h: Option<Tensor>,
}

/// Where the gradients of an update are added, F32.
pub struct Gradients<'a> {
    /// `[rank, in]`.
    pub a: &'a mut Tensor,
    /// `[out, rank]`.
    pub b: &'a mut Tensor,
}

/// The backward pass of one projection.
pub struct Backward<'a> {
    /// As given to [`forward`].
    pub projection: Projection<'a>,
    /// The gradient of `y`, `[tokens, out]`.
    pub dy: &'a Tensor,
    /// As [`forward`] returned it; needed where the projection has an update.
    pub h: Option<&'a Tensor>,
    /// The gradients of the update, unless it is frozen.
    pub gradients: Option<Gradients<'a>>,
}

/// `y = x·Wᵀ + bias + scaling·(drop(x)·Aᵀ)·Bᵀ` for each projection, with `x [tokens, in]` of a float type: on the
/// CPU F32, and on a CUDA device the type of the weights. `y` has the type of `x`, and `h` is F32.
///
/// # Errors
/// On shapes and data types that do not fit.
pub fn forward(x: &Tensor, projections: &[Projection]) -> Result<Vec<Output>> {
    let (tokens, _) = x.tokens("x", "[tokens, in_features]")?;
    for (index, projection) in projections.iter().enumerate() {
        projection.check(index, x)?;
    }
    let mut outputs = Vec::with_capacity(projections.len());
    for projection in projections {
        let y = Tensor::empty(
            x.device(),
            [tokens, projection.weight.out_features()],
            x.dtype(),
        )?;
        let h = match &projection.lora {
            Some(lora) => Some(Tensor::empty(
                x.device(),
                [tokens, lora.rank()],
                DType::F32,
            )?),
            None => None,
        };
        outputs.push(Output { y, h });
    }
    #[cfg(feature = "cuda")]
    if !x.device().is_cpu() {
        cuda::forward(x, projections, &mut outputs)?;
        return Ok(outputs);
    }
    forward::run(x, projections, &mut outputs)?;
    Ok(outputs)
}

/// From so many tokens on, weights in NF4 are dequantized to 16 bits before the product: a product that decodes them on
/// their way waits for its own arithmetic. Measured with 512 tokens, see docs/kernels.md.
const DEQUANTIZED_FROM_TOKENS: usize = 128;
/// Bytes of 16-bit weights at most that one operation makes.
const DEQUANTIZED_BYTES: usize = 256 << 20;

/// Bytes of weights that an operation on a CUDA device dequantizes for as long as it runs, of `elements` in NF4 that
/// projections which share an input have; 0 where it decodes them on their way into the product: for few tokens, where
/// they would be too many, and in F32, whose values keep all their bits.
pub fn dequantized_bytes(tokens: usize, activations: DType, elements: usize) -> usize {
    let bytes = elements * activations.size_in_bytes();
    let pays = tokens >= DEQUANTIZED_FROM_TOKENS
        && activations != DType::F32
        && bytes <= DEQUANTIZED_BYTES;
    if pays { bytes } else { 0 }
}

/// The backward pass of [`forward`]. With `dH = scaling·dY·B` of each projection:
/// `dB += scaling·dYᵀ·H`, `dA += dHᵀ·drop(x)`, and `dX = Σ dY·W + drop(dH·A)` over the projections, which is
/// returned when `need_dx` is set. The weight and the bias have no gradient.
///
/// # Errors
/// When `h` is missing where a projection has an update, and on shapes and data types that do not fit.
pub fn backward(x: &Tensor, mut items: Vec<Backward>, need_dx: bool) -> Result<Option<Tensor>> {
    let (tokens, _) = x.tokens("x", "[tokens, in_features]")?;
    for (index, item) in items.iter().enumerate() {
        item.check(index, x, tokens)?;
    }
    #[cfg(feature = "cuda")]
    if !x.device().is_cpu() {
        return cuda::backward(x, &mut items, need_dx);
    }
    backward::run(x, &mut items, need_dx)
}

/// `drop(x)` in memory of its own, `x [tokens, in]` of a float type (F32 on the CPU): for a frozen weight that reads it
/// too.
///
/// # Errors
/// On shapes, data types and devices that do not fit.
pub fn dropout(x: &Tensor, dropout: Dropout) -> Result<Tensor> {
    x.check_float("x")?;
    dropout.step.check_shape("dropout step", &[1])?;
    dropout.step.check_device("dropout step", x.device())?;
    #[cfg(feature = "cuda")]
    if !x.device().is_cpu() {
        return cuda::dropout(x, dropout);
    }
    x.check_dtype("x", DType::F32)?;
    let mask = dropout.mask()?;
    let mut dropped = x.try_clone()?;
    let chunks = dropped.as_f32_mut()?.par_chunks_mut(DROPOUT_CHUNK);
    let chunks = chunks.enumerate();
    parallel::for_each(chunks, |(chunk, x)| {
        mask.apply((chunk * DROPOUT_CHUNK) as u64, x);
    });
    Ok(dropped)
}

/// Elements of a task of [`dropout`]; a multiple of the four that one counter gives.
const DROPOUT_CHUNK: usize = 1 << 13;

/// `W + scaling·B·A` in F32, `[out, in]`: the weight with its update merged, as PEFT merges it.
///
/// # Errors
/// On shapes and data types that do not fit.
pub fn merge(weight: &Weight, a: &Tensor, b: &Tensor, scaling: f32) -> Result<Tensor> {
    let (_, in_features) = weight.matrix("weight")?;
    let lora = Lora {
        a,
        b,
        scaling,
        dropout: None,
    };
    lora.check(|name| format!("merge: {name}"), weight, in_features)?;
    #[cfg(feature = "cuda")]
    if !a.device().is_cpu() {
        return cuda::merge(weight, &lora);
    }
    forward::merge(weight, &lora)
}

impl Lora<'_> {
    pub(super) fn rank(&self) -> usize {
        self.a.shape().first().copied().unwrap_or(0)
    }

    pub(super) fn check(
        &self,
        name: impl Fn(&str) -> String,
        weight: &Weight,
        in_features: usize,
    ) -> Result<()> {
        self.check_shapes(&name, weight.out_features(), in_features)?;
        weight.check_device(&name("weight"), self.a.device())?;
        let Some(dropout) = self.dropout else {
            return Ok(());
        };
        if !(0.0..1.0).contains(&dropout.probability) {
            return Err(Error::Argument(format!(
                "{}: a probability of {} is not in 0..1",
                name("lora dropout"),
                dropout.probability
            )));
        }
        let (step, name) = (dropout.step, name("dropout step"));
        step.check_shape(&name, &[1])?;
        step.check_dtype(&name, DType::U32)?;
        step.check_device(&name, self.a.device())
    }

    /// Checks the pair as the update of a weight `[out_features, in_features]`.
    pub(super) fn check_shapes(
        &self,
        name: impl Fn(&str) -> String,
        out_features: usize,
        in_features: usize,
    ) -> Result<()> {
        let (rank, _) = self.a.matrix(&name("lora_a"), "[rank, in_features]")?;
        self.a.check_shape(&name("lora_a"), &[rank, in_features])?;
        self.b.check_shape(&name("lora_b"), &[out_features, rank])?;
        self.a.check_dtype(&name("lora_a"), DType::F32)?;
        self.b.check_dtype(&name("lora_b"), DType::F32)?;
        self.b.check_device(&name("lora_b"), self.a.device())
    }

    /// The dropout, where it changes anything.
    fn active_dropout(&self) -> Option<Dropout<'_>> {
        self.dropout.filter(|dropout| dropout.probability > 0.0)
    }
}

impl Projection<'_> {
    fn check(&self, index: usize, x: &Tensor) -> Result<()> {
        let name = |tensor: &str| format!("projection {index}: {tensor}");
        match x.device().is_cpu() {
            true => x.check_dtype("x", DType::F32)?,
            false => x.check_float("x")?,
        }
        let (tokens, _) = x.matrix("x", "[tokens, in_features]")?;
        let (out_features, in_features) = self.weight.matrix(&name("weight"))?;
        x.check_shape("x", &[tokens, in_features])?;
        self.weight.check_device(&name("weight"), x.device())?;
        if let Some(bias) = self.bias {
            bias.check_shape(&name("bias"), &[out_features])?;
            bias.check_dtype(&name("bias"), DType::F32)?;
            bias.check_device(&name("bias"), x.device())?;
        }
        match &self.lora {
            Some(lora) => lora.check(name, self.weight, in_features),
            None => Ok(()),
        }
    }
}

impl Backward<'_> {
    fn check(&self, index: usize, x: &Tensor, tokens: usize) -> Result<()> {
        let name = |tensor: &str| format!("projection {index}: {tensor}");
        self.projection.check(index, x)?;
        self.dy.check_shape(
            &name("dy"),
            &[tokens, self.projection.weight.out_features()],
        )?;
        self.dy.check_dtype(&name("dy"), x.dtype())?;
        self.dy.check_device(&name("dy"), x.device())?;
        match (&self.projection.lora, self.h, &self.gradients) {
            (None, _, Some(_)) => Err(Error::Argument(name(
                "gradients were given, but it has no low-rank update",
            ))),
            (Some(_), None, Some(_)) => Err(Error::Argument(name(
                "the h of the forward pass is missing",
            ))),
            (Some(lora), h, gradients) => {
                if let Some(h) = h {
                    h.check_shape(&name("h"), &[tokens, lora.rank()])?;
                    h.check_dtype(&name("h"), DType::F32)?;
                    h.check_device(&name("h"), x.device())?;
                }
                if let Some(gradients) = gradients {
                    for (part, gradient, of) in [
                        ("gradient of lora_a", &gradients.a, lora.a),
                        ("gradient of lora_b", &gradients.b, lora.b),
                    ] {
                        gradient.check_shape(&name(part), of.shape())?;
                        gradient.check_dtype(&name(part), DType::F32)?;
                        gradient.check_device(&name(part), x.device())?;
                    }
                }
                Ok(())
            }
            (None, _, None) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_tokens_dequantize_what_fits() {
        let elements = 4096 * 4096;
        assert_eq!(dequantized_bytes(128, DType::BF16, elements), 2 * elements);
        assert_eq!(
            dequantized_bytes(128, DType::F16, 8 * elements),
            16 * elements
        );
        assert_eq!(dequantized_bytes(127, DType::BF16, elements), 0);
        assert_eq!(dequantized_bytes(128, DType::F32, elements), 0);
        assert_eq!(dequantized_bytes(128, DType::BF16, 8 * elements + 1), 0);
    }
}
