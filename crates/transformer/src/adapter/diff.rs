//! How far two adapters of one model are from each other.

use std::collections::BTreeSet;

use fuselora_tensor::Tensor;

use super::{Adapter, LoraWeights};
use crate::error::Result;
use crate::low_rank::{self, Matrix};

/// Two adapters beside each other, in one module.
#[derive(Debug, Clone, PartialEq)]
pub struct ModuleDifference {
    /// Its path, with what is compared of it where that is not the low-rank update.
    pub module: String,
    /// The Frobenius norm of what the first adapter has, such as `scaling·B·A`; nothing where it has none.
    pub first: Option<f64>,
    /// That of the second.
    pub second: Option<f64>,
    /// The norm of the difference; nothing where one has none.
    pub difference: Option<f64>,
}

impl ModuleDifference {
    /// The difference beside the larger of the two: 0 is no difference, and up to 1 one is a part of the other.
    pub fn relative(&self) -> f64 {
        let larger = self.first.unwrap_or(0.0).max(self.second.unwrap_or(0.0));
        match self.difference {
            Some(0.0) => 0.0,
            Some(difference) => difference / larger,
            None => 1.0,
        }
    }
}

/// What two adapters of one model do to each module, in the order of the modules' paths.
///
/// # Errors
/// Weights that are not finite.
pub fn diff(first: &Adapter, second: &Adapter) -> Result<Vec<ModuleDifference>> {
    let mut differences = Vec::new();
    let adapters = [first, second];
    let modules: BTreeSet<&String> = adapters.iter().flat_map(|one| one.modules.keys()).collect();
    for module in modules {
        let [one, other] = adapters.map(|adapter| adapter.modules.get(module));
        differences.push(ModuleDifference {
            module: module.clone(),
            first: one.map(norm).transpose()?,
            second: other.map(norm).transpose()?,
            difference: one
                .zip(other)
                .map(|(one, other)| distance(one, other))
                .transpose()?,
        });
        type Vector = fn(&LoraWeights) -> Option<&Tensor>;
        let vectors: [(&str, Vector); 2] = [
            ("magnitude", |lora| lora.magnitude.as_ref()),
            ("bias of lora_B", |lora| lora.bias.as_ref()),
        ];
        for (part, vector) in vectors {
            let pair = [one, other].map(|lora| lora.and_then(vector));
            differences.extend(of_tensors(format!("{module}: {part}"), pair)?);
        }
    }
    let trained: BTreeSet<&String> = adapters.iter().flat_map(|one| one.trained.keys()).collect();
    for module in trained {
        let parts = adapters.map(|adapter| adapter.trained.get(module));
        let [weight, bias, tokens] = [
            parts.map(|part| part.and_then(|part| part.weight.as_ref()?.dense())),
            parts.map(|part| part.and_then(|part| part.bias.as_ref())),
            parts.map(|part| part.and_then(|part| Some(&part.tokens.as_ref()?.rows))),
        ];
        for (part, pair) in [("weight", weight), ("bias", bias), ("token rows", tokens)] {
            differences.extend(of_tensors(format!("{module}: {part}"), pair)?);
        }
    }
    Ok(differences)
}

/// Tensors that are compared as they are; nothing where neither adapter has one.
fn of_tensors(module: String, pair: [Option<&Tensor>; 2]) -> Result<Option<ModuleDifference>> {
    if pair.iter().all(Option::is_none) {
        return Ok(None);
    }
    let values = |tensor: Option<&Tensor>| tensor.map(Tensor::to_f32_vec).transpose();
    let [first, second] = [values(pair[0])?, values(pair[1])?];
    let norm = |values: &Vec<f32>| root_of_squares(values.iter().map(|&value| f64::from(value)));
    let difference = first
        .as_ref()
        .zip(second.as_ref())
        .filter(|(a, b)| a.len() == b.len());
    let difference = difference.map(|(a, b)| {
        let differences = a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b));
        root_of_squares(differences)
    });
    Ok(Some(ModuleDifference {
        module,
        first: first.as_ref().map(norm),
        second: second.as_ref().map(norm),
        difference,
    }))
}

fn root_of_squares(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

/// A and `scaling·B` in f64.
fn factors(lora: &LoraWeights, sign: f64) -> Result<(Matrix, Matrix)> {
    let matrix = |tensor: &Tensor| {
        let (rows, columns) = (tensor.shape()[0], tensor.shape()[1]);
        low_rank::matrix(&tensor.to_f32_vec()?, rows, columns)
    };
    Ok((
        matrix(&lora.a)?,
        matrix(&lora.b)? * (sign * f64::from(lora.scaling)),
    ))
}

/// `‖B·A‖`, from the products of B's columns and of A's rows: the whole matrix is never made.
fn norm_of_product(a: &Matrix, b: &Matrix) -> f64 {
    let squared = b.tr_mul(b).component_mul(&(a * a.transpose())).sum();
    squared.max(0.0).sqrt()
}

fn norm(lora: &LoraWeights) -> Result<f64> {
    let (a, b) = factors(lora, 1.0)?;
    Ok(norm_of_product(&a, &b))
}

fn distance(one: &LoraWeights, other: &LoraWeights) -> Result<f64> {
    let (a, b) = factors(one, 1.0)?;
    let (other_a, other_b) = factors(other, -1.0)?;
    if a == other_a && b == -&other_b {
        return Ok(0.0);
    }
    let (rank, other_rank) = (a.nrows(), other_a.nrows());
    let mut both_a = Matrix::zeros(rank + other_rank, a.ncols());
    both_a.rows_mut(0, rank).copy_from(&a);
    both_a.rows_mut(rank, other_rank).copy_from(&other_a);
    let mut both_b = Matrix::zeros(b.nrows(), rank + other_rank);
    both_b.columns_mut(0, rank).copy_from(&b);
    both_b.columns_mut(rank, other_rank).copy_from(&other_b);
    Ok(norm_of_product(&both_a, &both_b))
}
