//! Tables of rows by index: the token embedding, and learned positions.

use std::sync::Arc;

use fuselora_tensor::ops::gather;
use fuselora_tensor::ops::lora_embedding::{self, Update};
use fuselora_tensor::{Tensor, Weight};

use crate::adapter::{LoraWeights, TokenRows};
use crate::error::Result;
use crate::lora::{LoraGradients, Pass};

/// One frozen table, `y[i] = table[ids[i]]`.
pub struct Embedding {
    /// Module path, as PEFT names it: `model.embed_tokens`.
    pub name: String,
    /// Position in the model's list of modules.
    pub index: usize,
    /// `[ids, hidden]`.
    pub table: Arc<Weight>,
}

/// What backward needs besides the ids: the low-rank rows, `[n, rank]`.
pub struct Saved(Option<Tensor>);

fn operand(update: &LoraWeights) -> Update<'_> {
    Update {
        a: &update.a,
        b: &update.b,
        scaling: update.scaling,
    }
}

impl Embedding {
    /// The rows of `ids [n]`, `[n, hidden]`.
    pub fn forward(&self, ids: &Tensor, pass: &Pass<'_>) -> Result<(Tensor, Saved)> {
        let mut y = gather::forward(pass.weight(self.index, &self.table)?, ids)?;
        let update = pass.update(self.index);
        let h = update.map(|update| lora_embedding::forward(ids, operand(update), &mut y));
        let h = h.transpose()?;
        pass.check(&y, || self.name.clone())?;
        Ok((y, Saved(h)))
    }

    /// Adds to the gradients of what is trained of the table, from `dy [n, hidden]`; `ids` are on the host, too.
    pub fn backward(
        &self,
        dy: &Tensor,
        ids: &Tensor,
        on_host: &[u32],
        saved: &Saved,
        pass: &Pass<'_>,
        gradients: &mut LoraGradients,
    ) -> Result<()> {
        if let (Some(update), Some(h)) = (pass.update(self.index), &saved.0)
            && let Some(LoraWeights { a: da, b: db, .. }) = gradients.update(self.index)
        {
            lora_embedding::backward(dy, ids, operand(update), h, da, db)?;
        }
        let Some(trained) = gradients.trained(self.index) else {
            return Ok(());
        };
        if let Some(dtable) = trained.weight.as_mut().and_then(Weight::dense_mut) {
            gather::scatter_add_rows(&dy.cast(dtable.dtype())?, ids, dtable)?;
        }
        if let Some(TokenRows { indices, rows }) = &mut trained.tokens {
            let row_of = |id: &u32| indices.iter().position(|index| index == id);
            let (from, to): (Vec<u32>, Vec<u32>) = (0..)
                .zip(on_host)
                .filter_map(|(position, id)| Some((position, row_of(id)? as u32)))
                .unzip();
            let vector = |values: &[u32]| Tensor::from_u32(dy.device(), [values.len()], values);
            let dy = gather::rows(dy, &vector(&from)?)?.cast(rows.dtype())?;
            gather::scatter_add_rows(&dy, &vector(&to)?, rows)?;
        }
        Ok(())
    }
}
