//! What one pass over the model uses besides the frozen weights.

use std::ops::Range;

use fuselora_tensor::ops::lora_linear::{Dropout, Lora as Operand};
use fuselora_tensor::ops::segmented_lora::Segment;
use fuselora_tensor::ops::{dora, elementwise};
use fuselora_tensor::{Tensor, Weight};

use super::{Lora, Slot};
use crate::adapter::{LoraWeights, TokenRows};
use crate::error::{Error, Result};

/// What DoRA multiplies the outputs of a module by.
pub(crate) struct Direction {
    /// Row norms of the adapted weight, `[out_features]`.
    pub norm: Tensor,
    /// `magnitude / norm`, `[out_features]`.
    pub gain: Tensor,
}

/// Where the dropout masks of a pass come from.
#[derive(Debug, Clone, Copy)]
pub struct DropoutSeed<'a> {
    /// The run's seed.
    pub seed: u64,
    /// Counts micro-batches, so that every forward draws new masks and its backward the same ones; `[1]` U32 on the
    /// adapter's device.
    pub step: &'a Tensor,
}

/// Tokens of a batch that have an adapter of their own.
#[derive(Clone)]
pub struct AdapterRows<'a> {
    /// Which of the concatenated tokens.
    pub tokens: Range<usize>,
    /// Their adapter, which [`Lora::check_mixed`] admits.
    pub lora: &'a Lora,
}

impl<'a> AdapterRows<'a> {
    /// Neighbours that have the same adapter as one.
    pub fn merged(rows: impl IntoIterator<Item = AdapterRows<'a>>) -> Vec<AdapterRows<'a>> {
        let mut merged: Vec<AdapterRows> = Vec::new();
        for next in rows {
            match merged.last_mut() {
                Some(last)
                    if last.tokens.end == next.tokens.start
                        && std::ptr::eq(last.lora, next.lora) =>
                {
                    last.tokens.end = next.tokens.end;
                }
                _ => merged.push(next),
            }
        }
        merged
    }
}

/// What one pass over the model uses besides the frozen weights.
#[derive(Clone, Copy, Default)]
pub struct Pass<'a> {
    /// The adapter of every token, if any.
    pub lora: Option<&'a Lora>,
    /// In place of `lora`: adapters of some of the tokens each, in ascending order. All tokens pass over the frozen
    /// weights together; without gradients.
    pub mixed: &'a [AdapterRows<'a>],
    /// Set in training; without it nothing is dropped.
    pub dropout: Option<DropoutSeed<'a>>,
    /// Whether every operation's result is searched for NaN and infinity.
    pub trace: bool,
}

impl<'a> Pass<'a> {
    fn slot(&self, index: usize) -> Option<&'a Slot> {
        self.lora?.slots.get(index)
    }

    /// The low-rank update of module `index`.
    pub(crate) fn update(&self, index: usize) -> Option<&'a LoraWeights> {
        self.slot(index)?.lora.as_ref()
    }

    /// Whether anything of module `index` is trained.
    pub(crate) fn trains(&self, index: usize) -> bool {
        self.lora.is_some_and(|lora| lora.trains(index))
    }

    pub(crate) fn operand(&self, index: usize) -> Option<Operand<'a>> {
        let pair = self.update(index)?;
        let probability = self.lora?.config.dropout;
        let dropout = self.dropout.filter(|_| probability > 0.0).map(|d| Dropout {
            probability,
            seed: d.seed,
            stream: index as u32,
            step: d.step,
        });
        Some(Operand {
            a: &pair.a,
            b: &pair.b,
            scaling: pair.scaling,
            dropout,
        })
    }

    /// The updates of module `index` where tokens have adapters of their own.
    pub(crate) fn segments(&self, index: usize) -> Vec<Segment<'a>> {
        let own = |rows: &'a AdapterRows<'a>| {
            let pair = rows.lora.pair(index)?;
            Some(Segment {
                rows: rows.tokens.clone(),
                lora: Operand {
                    a: &pair.a,
                    b: &pair.b,
                    scaling: pair.scaling,
                    dropout: None,
                },
            })
        };
        self.mixed.iter().filter_map(own).collect()
    }

    /// The weight that module `index` has in place of the model's `frozen` one, or that one.
    pub(crate) fn weight<'b>(&self, index: usize, frozen: &'b Weight) -> Result<&'b Weight>
    where
        'a: 'b,
    {
        let Some(slot) = self.slot(index) else {
            return Ok(frozen);
        };
        if let Some(trained) = &slot.trained.weight {
            return Ok(trained);
        }
        if let Some(base) = slot.lora.as_ref().and_then(|lora| lora.base.as_ref()) {
            return Ok(base);
        }
        let Some((owner, tokens)) = self.tokens(index) else {
            return Ok(frozen);
        };
        let Some(owner) = self.slot(owner) else {
            return Ok(frozen);
        };
        if let Some(table) = owner.derived.table.get() {
            return Ok(table);
        }
        let table = with_rows(frozen, tokens)?;
        Ok(owner.derived.table.get_or_init(|| table))
    }

    /// A norm's weight in place of the model's `frozen` one, or that one.
    pub(crate) fn norm_weight<'b>(&self, index: usize, frozen: &'b Tensor) -> &'b Tensor
    where
        'a: 'b,
    {
        let slot = self.slot(index);
        let trained = slot.and_then(|slot| slot.trained.weight.as_ref());
        trained.and_then(Weight::dense).unwrap_or(frozen)
    }

    /// The bias that module `index` adds, of which the model has `frozen`; that of `lora_B` is in it.
    pub(crate) fn bias<'b>(
        &self,
        index: usize,
        frozen: Option<&'b Tensor>,
    ) -> Result<Option<&'b Tensor>>
    where
        'a: 'b,
    {
        let Some(slot) = self.slot(index) else {
            return Ok(frozen);
        };
        let own = slot.trained.bias.as_ref().or(frozen);
        let Some(lora) = &slot.lora else {
            return Ok(own);
        };
        let Some(of_b) = &lora.bias else {
            return Ok(own);
        };
        if let Some(bias) = slot.derived.bias.get() {
            return Ok(Some(bias));
        }
        let mut bias = of_b.try_clone()?;
        elementwise::scale(&mut bias, lora.scaling)?;
        if let Some(own) = own {
            elementwise::add_assign(&mut bias, own)?;
        }
        Ok(Some(slot.derived.bias.get_or_init(|| bias)))
    }

    /// The trained token rows of module `index`, and of which module they are.
    pub(crate) fn tokens(&self, index: usize) -> Option<(usize, &'a TokenRows)> {
        let owner = self.slot(index)?.shares_tokens_of.unwrap_or(index);
        Some((owner, self.slot(owner)?.trained.tokens.as_ref()?))
    }

    /// What DoRA needs of module `index`, which holds `weight`; nothing where it is plain LoRA.
    pub(crate) fn direction(&self, index: usize, weight: &Weight) -> Result<Option<&'a Direction>> {
        let Some(slot) = self.slot(index) else {
            return Ok(None);
        };
        let Some(LoraWeights {
            a,
            b,
            scaling,
            magnitude: Some(magnitude),
            ..
        }) = &slot.lora
        else {
            return Ok(None);
        };
        if let Some(direction) = slot.derived.direction.get() {
            return Ok(Some(direction));
        }
        let norm = dora::weight_norm(self.weight(index, weight)?, a, b, *scaling)?;
        let gain = dora::gain(magnitude, &norm)?;
        let direction = Direction { norm, gain };
        Ok(Some(slot.derived.direction.get_or_init(|| direction)))
    }

    /// Fails with the operation's name where tracing finds that its result is not finite.
    pub(crate) fn check(&self, result: &Tensor, operation: impl FnOnce() -> String) -> Result<()> {
        if self.trace && elementwise::find_nonfinite(result)?.is_some() {
            return Err(Error::NonFinite {
                operation: operation(),
            });
        }
        Ok(())
    }
}

/// A copy of `table` with other rows for some tokens.
pub(crate) fn with_rows(table: &Weight, tokens: &TokenRows) -> Result<Weight> {
    let width = table.in_features();
    let mut values = table.to_f32_vec()?;
    let rows = tokens.rows.to_f32_vec()?;
    for (&index, row) in tokens.indices.iter().zip(rows.chunks_exact(width)) {
        values[index as usize * width..][..width].copy_from_slice(row);
    }
    let device = tokens.rows.device();
    let shape = [table.out_features(), width];
    Ok(Weight::Dense(Tensor::from_f32(device, shape, &values)?))
}
