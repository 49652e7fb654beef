//! One adapter of several, each with a weight: PEFT's `add_weighted_adapter` (`tuners/lora/model.py`).

use std::collections::{BTreeMap, BTreeSet};

use fuselora_tensor::{Device, Tensor};

use super::{Adapter, InitLoraWeights, LoraWeights, ModuleSelector};
use crate::error::{Error, Result};
use crate::low_rank::{self, Matrix};

/// How updates become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Combination {
    /// A and B each summed, with the roots of weight and scaling: cheap, and not the sum of the products.
    Linear,
    /// A and B side by side, which is the sum, of all ranks together.
    Cat,
    /// The largest part of the sum that this rank holds; `None` is the largest of the ranks.
    Svd(Option<usize>),
}

/// Combines adapters of one model, each with its weight.
///
/// # Errors
/// No adapters, a kind of adapter of which a sum has no meaning, or ranks that do not fit each other.
pub fn combine(adapters: &[(Adapter, f64)], combination: Combination) -> Result<Adapter> {
    let Some((first, _)) = adapters.first() else {
        return Err(Error::adapter("there is no adapter to combine"));
    };
    for (adapter, _) in adapters {
        adapter.check_plain("be combined: only plain low-rank updates add up")?;
    }
    let ranks = adapters.iter().map(|(adapter, _)| {
        let patterns = adapter.config.rank_pattern.iter().map(|(_, rank)| *rank);
        patterns.fold(adapter.config.rank, usize::max)
    });
    let rank = match combination {
        Combination::Linear => first.config.rank,
        Combination::Cat => ranks.sum(),
        Combination::Svd(rank) => rank.unwrap_or_else(|| ranks.max().unwrap_or_default()),
    };
    let names: BTreeSet<&String> = adapters
        .iter()
        .flat_map(|(adapter, _)| adapter.modules.keys())
        .collect();
    let mut modules = BTreeMap::new();
    for &name in &names {
        let updates: Vec<(&LoraWeights, f64)> = adapters
            .iter()
            .filter_map(|(adapter, weight)| Some((adapter.modules.get(name)?, *weight)))
            .collect();
        let (a, b) = update(name, &updates, combination, rank)?;
        let tensor = |matrix: &Matrix| {
            let shape = [matrix.nrows(), matrix.ncols()];
            Tensor::from_f32(&Device::cpu(), shape, &low_rank::row_major(matrix))
        };
        let lora = LoraWeights {
            a: tensor(&a)?,
            b: tensor(&b)?,
            scaling: 1.0,
            rank,
            magnitude: None,
            bias: None,
            embedding: updates.iter().any(|(update, _)| update.embedding),
            base: updates.iter().find_map(|(update, _)| update.base.clone()),
            initial: None,
        };
        modules.insert(name.clone(), lora);
    }
    let mut config = first.config.clone();
    config.rank = rank;
    config.alpha = rank as f64;
    config.use_rslora = false;
    config.rank_pattern.clear();
    config.alpha_pattern.clear();
    config.init_lora_weights = InitLoraWeights::KaimingUniform;
    config.exclude_modules = None;
    config.layers_to_transform = None;
    config.layers_pattern.clear();
    config.target_modules = ModuleSelector::Names(names.into_iter().cloned().collect());
    Ok(Adapter {
        config,
        modules,
        trained: BTreeMap::new(),
    })
}

/// A and B of one module, to be scaled by 1.
fn update(
    module: &str,
    updates: &[(&LoraWeights, f64)],
    combination: Combination,
    rank: usize,
) -> Result<(Matrix, Matrix)> {
    let mut factors = Vec::with_capacity(updates.len());
    for (update, weight) in updates {
        let matrix = |tensor: &Tensor| {
            let (rows, columns) = (tensor.shape()[0], tensor.shape()[1]);
            low_rank::matrix(&tensor.to_f32_vec()?, rows, columns)
        };
        let weight = weight * f64::from(update.scaling);
        factors.push((matrix(&update.a)?, matrix(&update.b)?, weight));
    }
    let (in_features, out_features) = (factors[0].0.ncols(), factors[0].1.nrows());
    let mut a = Matrix::zeros(rank, in_features);
    let mut b = Matrix::zeros(out_features, rank);
    match combination {
        Combination::Linear => {
            for (a_of, b_of, weight) in factors {
                if a_of.nrows() != rank {
                    return Err(Error::adapter(format!(
                        "`{module}` has updates of ranks {rank} and {}, and `linear` needs one rank: use cat or svd",
                        a_of.nrows()
                    )));
                }
                let root = weight.abs().sqrt();
                a += a_of * (root * weight.signum());
                b += b_of * root;
            }
        }
        Combination::Cat => {
            let mut at = 0;
            for (a_of, b_of, weight) in factors {
                let n = a_of.nrows();
                a.rows_mut(at, n).copy_from(&(a_of * weight));
                b.columns_mut(at, n).copy_from(&b_of);
                at += n;
            }
        }
        Combination::Svd(_) => {
            let largest = in_features.min(out_features);
            if rank > largest {
                return Err(Error::adapter(format!(
                    "rank {rank} is more than the {largest} of the weight of `{module}`"
                )));
            }
            let mut sum = Matrix::zeros(out_features, in_features);
            for (a_of, b_of, weight) in factors {
                sum += b_of * a_of * weight;
            }
            let svd = low_rank::svd(&sum, rank);
            (a, b) = (svd.v, svd.u);
            for (index, s) in svd.s.iter().enumerate() {
                b.column_mut(index).scale_mut(*s);
            }
        }
    }
    Ok((a, b))
}
