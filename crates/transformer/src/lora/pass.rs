//! What one pass over the model uses besides the frozen weights.

use std::ops::Range;
use std::sync::OnceLock;

use fuselora_tensor::ops::lora_linear::{Dropout, Lora as Operand};
use fuselora_tensor::ops::segmented_lora::{self, Segment, Transposed};
use fuselora_tensor::ops::{dora, elementwise, gather};
use fuselora_tensor::{DType, Tensor, Weight};

use super::{Lora, Slot};
use crate::adapter::{LoraWeights, TokenRows};
use crate::error::{Error, Result};
use crate::model::transpose;

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
    pub(crate) fn segments(&self, index: usize) -> Result<Vec<Segment<'a>>> {
        let own = |rows: &'a AdapterRows<'a>| {
            let slot = rows.lora.slots.get(index)?;
            let pair = slot.lora.as_ref()?;
            let few = pair.b.device().is_cpu() && rows.tokens.len() <= segmented_lora::FEW_ROWS;
            let transposed = || match few {
                true => derived(&slot.derived.transposed, || {
                    Ok([transpose(&pair.a)?, transpose(&pair.b)?])
                })
                .map(|[a, b]| Some(Transposed { a, b })),
                false => Ok(None),
            };
            Some(transposed().map(|transposed| Segment {
                rows: rows.tokens.clone(),
                lora: Operand {
                    a: &pair.a,
                    b: &pair.b,
                    scaling: pair.scaling,
                    dropout: None,
                },
                transposed,
            }))
        };
        self.mixed.iter().filter_map(own).collect()
    }

    /// The weight that module `index` has in place of the model's `frozen` one, or that one.
    pub(crate) fn weight<'b>(&self, index: usize, frozen: &'b Weight) -> Result<&'b Weight>
    where
        'a: 'b,
    {
        let (Some(lora), Some(slot)) = (self.lora, self.slot(index)) else {
            return Ok(frozen);
        };
        if let Some(own) = slot.own_weight() {
            return match own.dense().filter(|_| slot.is_cast(lora.activations)) {
                Some(tensor) => derived(&slot.derived.weight, || {
                    Ok(Weight::Dense(tensor.cast(lora.activations)?))
                }),
                None => Ok(own),
            };
        }
        let Some((owner, tokens)) = self.tokens(index) else {
            return Ok(frozen);
        };
        let Some(owner) = self.slot(owner) else {
            return Ok(frozen);
        };
        derived(&owner.derived.weight, || {
            with_rows(frozen, tokens, lora.activations)
        })
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
        let bias = derived(&slot.derived.bias, || {
            let mut bias = of_b.try_clone()?;
            elementwise::scale(&mut bias, lora.scaling)?;
            if let Some(own) = own {
                elementwise::add_assign(&mut bias, own)?;
            }
            Ok(bias)
        })?;
        Ok(Some(bias))
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
        let direction = derived(&slot.derived.direction, || {
            let norm = dora::weight_norm(self.weight(index, weight)?, a, b, *scaling)?;
            let gain = dora::gain(magnitude, &norm)?;
            Ok(Direction { norm, gain })
        })?;
        Ok(Some(direction))
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

/// What was computed before, or is now.
fn derived<T>(kept: &OnceLock<T>, compute: impl FnOnce() -> Result<T>) -> Result<&T> {
    if let Some(value) = kept.get() {
        return Ok(value);
    }
    let value = compute()?;
    Ok(kept.get_or_init(|| value))
}

/// A copy of `table` with other rows for some tokens, as floats of a type.
pub(crate) fn with_rows(table: &Weight, tokens: &TokenRows, dtype: DType) -> Result<Weight> {
    let mut table = match table {
        Weight::Dense(table) => table.cast(dtype)?,
        Weight::Nf4(table) => table.dequantize(dtype)?,
    };
    gather::set_rows(&mut table, &tokens.indices, &tokens.rows.cast(dtype)?)?;
    Ok(Weight::Dense(table))
}
