//! Initialisations that are made of the frozen weight and leave another base in its place: `pissa_init`, `olora_init`
//! and `loftq_init` in PEFT's `tuners/lora/layer.py`.
//!
//! The base is made anew wherever the adapter is bound to a model, as PEFT does when it loads one. An adapter that is
//! written for use holds what was trained and, negated, what it began with, side by side: a plain update of twice the
//! rank, for the model as it is (`subtract_mutated_init` in `tuners/lora/model.py`).

use std::sync::Arc;

use fuselora_tensor::ops::lora_linear;
use fuselora_tensor::{Device, Nf4Weight, Tensor, Weight};
use rayon::prelude::*;

use super::{
    Adapter, AdapterConfig, DTYPE, InitLoraWeights, LoraWeights, ModuleKind, Target, init,
};
use crate::error::{Error, Result};
use crate::families::OUTPUT_HEAD;
use crate::low_rank::{self, Matrix, Svd};
use crate::model::Model;

/// Elements of a block of NF4, as LoftQ has it in PEFT.
const BLOCK_SIZE: usize = 64;

/// The seed of a randomised decomposition that is made again for an adapter that was read; PEFT draws it anew too.
const SEED_OF_READ: u64 = 0;

/// The update as it was at first, which the base is without.
pub struct Initial {
    /// `lora_A`, `[rank, in_features]`, f32.
    pub a: Tensor,
    /// `lora_B`, `[out_features, rank]`, f32.
    pub b: Tensor,
}

/// A weight on the host, `[out_features, in_features]`.
struct Host {
    values: Vec<f32>,
    shape: [usize; 2],
}

impl Host {
    fn of(weight: &Weight, init: InitLoraWeights, module: &str) -> Result<Host> {
        if weight.dense().is_none() {
            return Err(Error::adapter(format!(
                "`init_lora_weights` \"{init}\" needs weights in floats, and that of `{module}` is quantized"
            )));
        }
        Ok(Host {
            values: weight.to_f32_vec()?,
            shape: [weight.out_features(), weight.in_features()],
        })
    }

    fn matrix(&self) -> Result<Matrix> {
        low_rank::matrix(&self.values, self.shape[0], self.shape[1])
    }

    fn tensor(&self) -> Result<Tensor> {
        Ok(Tensor::from_f32(&Device::cpu(), self.shape, &self.values)?)
    }

    /// `W - scaling·B·A`.
    fn without(&self, a: &Tensor, b: &Tensor, scaling: f32) -> Result<Tensor> {
        let weight = Weight::Dense(self.tensor()?);
        let cpu = Device::cpu();
        let (a, b) = (a.to_device(&cpu)?, b.to_device(&cpu)?);
        Ok(lora_linear::merge(&weight, &a, &b, -scaling)?)
    }

    fn tensors(&self, a: &Matrix, b: &Matrix) -> Result<(Tensor, Tensor)> {
        let tensor = |matrix: &Matrix| {
            let shape = [matrix.nrows(), matrix.ncols()];
            Tensor::from_f32(&Device::cpu(), shape, &low_rank::row_major(matrix))
        };
        Ok((tensor(a)?, tensor(b)?))
    }

    /// What LoftQ leaves of the weight, in NF4's values.
    fn quantized(&self, rank: usize, iterations: usize) -> Result<Tensor> {
        let mut source = self.tensor()?;
        for left in (0..iterations).rev() {
            let base = Nf4Weight::quantize(&source, BLOCK_SIZE, false)?.dequantize(DTYPE)?;
            if left == 0 {
                return Ok(base);
            }
            let (a, b) = self.rest(&base, rank)?;
            source = self.without(&a, &b, 1.0)?;
        }
        Err(Error::adapter("`loftq_iter` is 0; it must be 1 or more"))
    }

    /// The largest part of what `base` lacks.
    fn rest(&self, base: &Tensor, rank: usize) -> Result<(Tensor, Tensor)> {
        let [rows, columns] = self.shape;
        let base = low_rank::matrix(base.as_f32()?, rows, columns)?;
        let (a, b) = halves(low_rank::svd(&(self.matrix()? - base), rank), 1.0);
        self.tensors(&a, &b)
    }
}

/// A and B of equal share in each singular value, with `scaling·B·A` the decomposed matrix.
fn halves(svd: Svd, scaling: f32) -> (Matrix, Matrix) {
    let Svd { mut u, s, mut v } = svd;
    for (index, s) in s.iter().enumerate() {
        let root = (s / f64::from(scaling)).sqrt();
        u.column_mut(index).scale_mut(root);
        v.row_mut(index).scale_mut(root);
    }
    (v, u)
}

/// A and B of a fresh update of `weight`, on the host.
pub(super) fn fresh(
    init: InitLoraWeights,
    target: &Target,
    weight: &Weight,
    seed: u64,
) -> Result<(Tensor, Tensor)> {
    let host = Host::of(weight, init, &target.module)?;
    factors(
        init,
        &target.module,
        target.rank,
        target.scaling,
        &host,
        seed,
    )
}

fn factors(
    init: InitLoraWeights,
    module: &str,
    rank: usize,
    scaling: f32,
    host: &Host,
    seed: u64,
) -> Result<(Tensor, Tensor)> {
    let (a, b) = match init {
        InitLoraWeights::Pissa {
            iterations: Some(iterations),
        } => {
            let random = &mut init::stream(module, seed);
            let svd = low_rank::randomized_svd(&host.matrix()?, rank, iterations, random);
            halves(svd, scaling)
        }
        InitLoraWeights::Olora => {
            let (q, r) = low_rank::qr(host.matrix()?, rank);
            (r, q)
        }
        InitLoraWeights::Loftq { iterations } => {
            let base = host.quantized(rank, iterations)?;
            return host.rest(&base, rank);
        }
        _ => halves(low_rank::svd(&host.matrix()?, rank), scaling),
    };
    host.tensors(&a, &b)
}

impl Adapter {
    /// Gives every update the base that its initialisation leaves, where it has none yet.
    pub(crate) fn leave_bases(&mut self, model: &Model) -> Result<()> {
        let init = self.config.init_lora_weights;
        if !init.replaces_base() {
            return Ok(());
        }
        let updates = self.modules.par_iter_mut();
        updates.try_for_each(|(module, lora)| {
            let Some(weight) = model.weight(module).filter(|_| lora.base.is_none()) else {
                return Ok(());
            };
            let (base, initial) = lora.base_of(init, module, &weight)?;
            lora.base = Some(Arc::new(base));
            lora.initial = initial.or(lora.initial.take());
            Ok(())
        })
    }
}

impl LoraWeights {
    /// The base that the initialisation leaves in place of the model's `weight`, in the same type; and the update at
    /// first, where the base is without it.
    pub(crate) fn base_of(
        &self,
        init: InitLoraWeights,
        module: &str,
        weight: &Weight,
    ) -> Result<(Weight, Option<Initial>)> {
        let host = Host::of(weight, init, module)?;
        let (base, initial) = match (init, &self.initial) {
            (InitLoraWeights::Loftq { iterations }, _) => {
                (host.quantized(self.rank, iterations)?, None)
            }
            (_, Some(Initial { a, b })) => (host.without(a, b, self.scaling)?, None),
            (_, None) => {
                let (a, b) = factors(init, module, self.rank, self.scaling, &host, SEED_OF_READ)?;
                let base = host.without(&a, &b, self.scaling)?;
                (base, Some(Initial { a, b }))
            }
        };
        let dtype = weight.dense().map_or(DTYPE, Tensor::dtype);
        let base = base.cast(dtype)?.to_device(weight.device())?;
        Ok((Weight::Dense(base), initial))
    }

    /// A and B beside what they were at first, negated: `B·A - B₀·A₀` as one product.
    pub(super) fn joined(&self) -> Result<Option<[Tensor; 2]>> {
        let Some(initial) = &self.initial else {
            return Ok(None);
        };
        let device = Device::cpu();
        let a = [self.a.to_f32_vec()?, initial.a.to_f32_vec()?].concat();
        let (b, b0) = (self.b.to_f32_vec()?, initial.b.to_f32_vec()?);
        let rows = b.chunks_exact(self.rank).zip(b0.chunks_exact(self.rank));
        let b: Vec<f32> = rows
            .flat_map(|(b, b0)| b.iter().copied().chain(b0.iter().map(|value| -value)))
            .collect();
        let rank = 2 * self.rank;
        Ok(Some([
            Tensor::from_f32(&device, [rank, a.len() / rank], &a)?,
            Tensor::from_f32(&device, [b.len() / rank, rank], &b)?,
        ]))
    }
}

impl AdapterConfig {
    /// That of the same updates as differences from what they began with, by twice the rank.
    pub(super) fn joined(&self) -> AdapterConfig {
        let growth = if self.use_rslora { 2f64.sqrt() } else { 2.0 };
        let mut config = self.clone();
        config.init_lora_weights = InitLoraWeights::KaimingUniform;
        config.rank *= 2;
        config.alpha *= growth;
        for (_, rank) in &mut config.rank_pattern {
            *rank *= 2;
        }
        for (_, alpha) in &mut config.alpha_pattern {
            *alpha *= growth;
        }
        config
    }

    /// Fails where the initialisation does not fit a target; by PEFT's rules, or because PEFT's result has no meaning.
    pub(super) fn check_init(&self, targets: &[Target]) -> Result<()> {
        let init = self.init_lora_weights;
        let refuse = |target: &Target, reason: String| {
            Err(Error::adapter(format!(
                "`init_lora_weights` \"{init}\" does not fit `{}`: {reason}",
                target.module
            )))
        };
        for target in targets {
            let smallest = target.in_features.min(target.out_features);
            let embedding = target.kind == ModuleKind::Embedding;
            if init == InitLoraWeights::Orthogonal && target.rank % 2 == 1 && !embedding {
                return refuse(target, format!("rank {} is not even", target.rank));
            }
            if !init.replaces_base() {
                continue;
            }
            if embedding || target.module == OUTPUT_HEAD {
                return refuse(target, "it is for the projections of blocks only".into());
            }
            if target.kind == ModuleKind::Conv1d && !matches!(init, InitLoraWeights::Pissa { .. }) {
                return refuse(
                    target,
                    "PEFT has it for weights that are not transposed, and those of GPT-2's Conv1D are".into(),
                );
            }
            if target.rank > smallest {
                return refuse(
                    target,
                    format!("rank {} is more than the weight's {smallest}", target.rank),
                );
            }
            if init.subtracts() && target.scaling <= 0.0 {
                return refuse(
                    target,
                    format!("its scaling {} is not positive", target.scaling),
                );
            }
        }
        Ok(())
    }
}
