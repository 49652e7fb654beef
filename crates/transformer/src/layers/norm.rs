//! RMSNorm (Zhang and Sennrich 2019).

use fuselora_tensor::Tensor;
use fuselora_tensor::ops::rms_norm;

use crate::error::Result;

/// A frozen normalisation over the last dimension.
pub struct Norm {
    /// `[width]`.
    pub weight: Tensor,
    /// Added to the mean square.
    pub eps: f32,
}

impl Norm {
    /// Normalises `x [tokens, width]`; also returns `1 / rms` of each token, `[tokens]`.
    pub fn forward(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok(rms_norm::forward(x, &self.weight, self.eps)?)
    }

    /// Normalises `sum = residual + delta` in one pass; returns `(sum, y, rstd)`.
    pub fn forward_add(
        &self,
        residual: &Tensor,
        delta: &Tensor,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        Ok(rms_norm::forward_add(
            residual,
            delta,
            &self.weight,
            self.eps,
        )?)
    }

    /// The output again, from the input and its `rstd`: backward needs it, forward need not keep it.
    pub fn recompute(&self, x: &Tensor, rstd: &Tensor) -> Result<Tensor> {
        Ok(rms_norm::recompute(x, rstd, &self.weight)?)
    }

    /// Adds the input's gradient to `dx`, which is the residual stream's.
    pub fn backward(&self, dy: &Tensor, x: &Tensor, rstd: &Tensor, dx: &mut Tensor) -> Result<()> {
        Ok(rms_norm::backward(dy, x, rstd, &self.weight, dx, None)?)
    }
}
