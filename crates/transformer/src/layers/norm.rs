//! The normalisations of a decoder: RMSNorm (Zhang and Sennrich 2019) and layer normalisation (Ba, Kiros
//! and Hinton 2016).

use fuselora_tensor::Tensor;
use fuselora_tensor::ops::{layer_norm, rms_norm};

use crate::error::Result;

/// A frozen normalisation over the last dimension.
pub struct Norm {
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
    /// Normalises `x [tokens, width]`.
    pub fn forward(&self, x: &Tensor) -> Result<(Tensor, Statistics)> {
        Ok(match &self.bias {
            None => {
                let (y, rstd) = rms_norm::forward(x, &self.weight, self.eps)?;
                (y, Statistics::Rms(rstd))
            }
            Some(bias) => {
                let (y, statistics) = layer_norm::forward(x, &self.weight, bias, self.eps)?;
                (y, Statistics::Layer(statistics))
            }
        })
    }

    /// Normalises `sum = residual + delta` in one pass; returns `(sum, y, statistics)`.
    pub fn forward_add(
        &self,
        residual: &Tensor,
        delta: &Tensor,
    ) -> Result<(Tensor, Tensor, Statistics)> {
        Ok(match &self.bias {
            None => {
                let (sum, y, rstd) =
                    rms_norm::forward_add(residual, delta, &self.weight, self.eps)?;
                (sum, y, Statistics::Rms(rstd))
            }
            Some(bias) => {
                let (sum, y, statistics) =
                    layer_norm::forward_add(residual, delta, &self.weight, bias, self.eps)?;
                (sum, y, Statistics::Layer(statistics))
            }
        })
    }

    /// The output again, from the input and its statistics: backward needs it, forward need not keep it.
    pub fn recompute(&self, x: &Tensor, statistics: &Statistics) -> Result<Tensor> {
        Ok(match (statistics, &self.bias) {
            (Statistics::Rms(rstd), _) => rms_norm::recompute(x, rstd, &self.weight)?,
            (Statistics::Layer(statistics), Some(bias)) => {
                layer_norm::recompute(x, statistics, &self.weight, bias)?
            }
            (Statistics::Layer(_), None) => return Err(foreign()),
        })
    }

    /// Adds the input's gradient to `dx`, which is the residual stream's.
    pub fn backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        statistics: &Statistics,
        dx: &mut Tensor,
    ) -> Result<()> {
        match statistics {
            Statistics::Rms(rstd) => rms_norm::backward(dy, x, rstd, &self.weight, dx, None)?,
            Statistics::Layer(statistics) => {
                layer_norm::backward(dy, x, statistics, &self.weight, dx, None)?;
            }
        }
        Ok(())
    }
}

fn foreign() -> crate::error::Error {
    crate::error::Error::Input("a norm was given the statistics of another kind of norm".into())
}
