//! The normalisations of a decoder: RMSNorm (Zhang and Sennrich 2019) and layer normalisation (Ba, Kiros
//! and Hinton 2016).

use fuselora_tensor::ops::{layer_norm, rms_norm};
use fuselora_tensor::{DType, Tensor, Weight};

use crate::error::Result;
use crate::lora::{LoraGradients, Pass};

/// A frozen normalisation over the last dimension.
pub struct Norm {
    /// Module path: `model.layers.0.input_layernorm`.
    pub name: String,
    /// Position in the model's list of modules.
    pub index: usize,
    /// `[width]`.
    pub weight: Tensor,
    /// `[width]`: layer normalisation has one, RMSNorm has none.
    pub bias: Option<Tensor>,
    /// Added to the mean square or the variance.
    pub eps: f32,
}

/// What backward needs of each token.
pub enum Statistics {
    /// `1 / rms`, `[tokens]`.
    Rms(Tensor),
    /// Mean and `1 / deviation`.
    Layer(layer_norm::Statistics),
}

impl Norm {
    fn weight<'a>(&'a self, pass: &Pass<'a>) -> &'a Tensor {
        pass.norm_weight(self.index, &self.weight)
    }

    fn bias<'a>(&'a self, pass: &Pass<'a>) -> Result<Option<&'a Tensor>> {
        pass.bias(self.index, self.bias.as_ref())
    }

    /// Normalises `x [tokens, width]`.
    pub fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<(Tensor, Statistics)> {
        let weight = self.weight(pass);
        Ok(match self.bias(pass)? {
            None => {
                let (y, rstd) = rms_norm::forward(x, weight, self.eps)?;
                (y, Statistics::Rms(rstd))
            }
            Some(bias) => {
                let (y, statistics) = layer_norm::forward(x, weight, bias, self.eps)?;
                (y, Statistics::Layer(statistics))
            }
        })
    }

    /// Normalises `sum = residual + delta` in one pass; returns `(sum, y, statistics)`.
    pub fn forward_add(
        &self,
        residual: &Tensor,
        delta: &Tensor,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, Tensor, Statistics)> {
        let weight = self.weight(pass);
        Ok(match self.bias(pass)? {
            None => {
                let (sum, y, rstd) = rms_norm::forward_add(residual, delta, weight, self.eps)?;
                (sum, y, Statistics::Rms(rstd))
            }
            Some(bias) => {
                let (sum, y, statistics) =
                    layer_norm::forward_add(residual, delta, weight, bias, self.eps)?;
                (sum, y, Statistics::Layer(statistics))
            }
        })
    }

    /// The output again, from the input and its statistics: backward needs it, forward need not keep it.
    pub fn recompute(
        &self,
        x: &Tensor,
        statistics: &Statistics,
        pass: &Pass<'_>,
    ) -> Result<Tensor> {
        let weight = self.weight(pass);
        Ok(match (statistics, self.bias(pass)?) {
            (Statistics::Rms(rstd), _) => rms_norm::recompute(x, rstd, weight)?,
            (Statistics::Layer(statistics), Some(bias)) => {
                layer_norm::recompute(x, statistics, weight, bias)?
            }
            (Statistics::Layer(_), None) => return Err(foreign()),
        })
    }

    /// Adds the input's gradient to `dx`, which is the residual stream's, and those of weight and bias to
    /// `gradients` where they are trained.
    pub fn backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        statistics: &Statistics,
        dx: &mut Tensor,
        pass: &Pass<'_>,
        gradients: &mut LoraGradients,
    ) -> Result<()> {
        let weight = self.weight(pass);
        let trained = gradients.trained(self.index);
        let (dweight, dbias) = match trained {
            Some(trained) => (
                trained.weight.as_mut().and_then(Weight::dense_mut),
                trained.bias.as_mut(),
            ),
            None => (None, None),
        };
        match statistics {
            Statistics::Rms(rstd) => rms_norm::backward(dy, x, rstd, weight, dx, dweight)?,
            Statistics::Layer(statistics) => {
                // The operation gives both gradients or none: the one that is not asked for goes nowhere.
                let unasked = || Tensor::zeros(dy.device(), weight.shape(), DType::F32);
                let (mut no_weight, mut no_bias) = match (&dweight, &dbias) {
                    (Some(_), None) => (None, Some(unasked()?)),
                    (None, Some(_)) => (Some(unasked()?), None),
                    _ => (None, None),
                };
                let both = dweight
                    .or(no_weight.as_mut())
                    .zip(dbias.or(no_bias.as_mut()));
                let both = both.map(|(weight, bias)| layer_norm::Gradients { weight, bias });
                layer_norm::backward(dy, x, statistics, weight, dx, both)?;
            }
        }
        Ok(())
    }
}

fn foreign() -> crate::error::Error {
    crate::error::Error::Input("a norm was given the statistics of another kind of norm".into())
}
