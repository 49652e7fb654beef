//! Launches `pass_f32.cu`, `pass_16bit.cu` and `sum.cu`: passes over activations for the low-rank side, and the sums of
//! what their blocks leave.

use super::{Lora, Projection};
use crate::abi::{
    LORA_MAX_GROUP, LORA_MAX_SUMS, LORA_PASS_DA_SHARED, LORA_PASS_DH_DB_SHARED,
    LORA_PASS_DH_SHARED, LORA_PASS_F32_FEATURES, LORA_PASS_F32_RANKS, LORA_PASS_FEATURES,
    LORA_PASS_H_SHARED, LORA_PASS_LEAST, LORA_PASS_RANKS, LORA_PASS_TOKENS, LORA_SUM_THREADS,
    LORA_THREADS, LoraPass, LoraSide, LoraSum, LoraSums,
};
use crate::launch::{GRID_X, GRID_YZ, blocks};
use crate::modules;
use crate::{Element, Kernels, LaunchError};
use cudarc::driver::{LaunchConfig, PushKernelArg};

/// What a pass computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    /// `H = drop(X)·Aᵀ`
    H,
    /// `dH = scaling·dY·B`, for an update whose own gradients are not wanted
    Dh,
    /// `dH = scaling·dY·B` and `dB = scaling·dYᵀ·H`
    DhDb,
    /// `dA = dHᵀ·drop(X)`
    Da,
}

/// How activations `[tokens, features]` are cut into blocks. It depends on nothing else, so that the
/// order of every sum is the same on every device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Split {
    tokens: u64,
    features: u64,
    block_tokens: u64,
    block_features: u64,
}

impl Split {
    pub(super) fn new(pass: Pass, element: Element, tokens: u32, features: u32) -> Split {
        // Sums over tokens are written once per block of tokens, so those are tall; sums over
        // features are as long as a block's features.
        let (block_tokens, block_features) = match (element, pass) {
            (Element::F32, Pass::H) => (64, 1024),
            (Element::F32, _) => (512, LORA_PASS_F32_FEATURES),
            (_, Pass::Da) => (LORA_PASS_TOKENS, LORA_PASS_FEATURES / 2),
            (_, _) => (LORA_PASS_TOKENS / 2, LORA_PASS_FEATURES),
        };
        let mut split = Split {
            tokens: u64::from(tokens),
            features: u64::from(features),
            block_tokens: block_tokens.into(),
            block_features: block_features.into(),
        };
        if element != Element::F32 {
            split.fill_a_gpu();
        }
        split
    }

    /// Halves the longer side of the blocks until there are enough of them, or they are small.
    fn fill_a_gpu(&mut self) {
        const MANY_BLOCKS: u64 = 256;
        while self.token_splits() * self.feature_splits() < MANY_BLOCKS {
            let longer = (&mut self.block_tokens).max(&mut self.block_features);
            if *longer <= u64::from(LORA_PASS_LEAST) {
                break;
            }
            *longer /= 2;
        }
    }

    fn token_splits(&self) -> u64 {
        self.tokens.div_ceil(self.block_tokens)
    }

    fn feature_splits(&self) -> u64 {
        self.features.div_ceil(self.block_features)
    }

    /// Elements of the partial sums over features, `[splits, tokens, rank]`.
    pub(super) fn row_partials(&self, lora: &Lora) -> u64 {
        self.feature_splits() * self.tokens * u64::from(lora.rank)
    }

    /// Elements of the partial sums over tokens, `[splits, features, rank]` in any order.
    pub(super) fn column_partials(&self, lora: &Lora) -> u64 {
        self.token_splits() * self.features * u64::from(lora.rank)
    }

    /// The sum of [`Split::row_partials`].
    pub(super) fn row_sum(&self, lora: &Lora, partials: u64, out: u64, scaling: f32) -> LoraSum {
        LoraSum {
            partials,
            out,
            count: self.tokens * u64::from(lora.rank),
            splits: self.feature_splits() as u32,
            scaling,
            accumulate: 0,
        }
    }

    /// The sum of [`Split::column_partials`], added to `out`.
    pub(super) fn column_sum(&self, lora: &Lora, partials: u64, out: u64, scaling: f32) -> LoraSum {
        LoraSum {
            partials,
            out,
            count: self.features * u64::from(lora.rank),
            splits: self.token_splits() as u32,
            scaling,
            accumulate: 1,
        }
    }
}

/// f32 elements of the partial sums that the passes of a forward and a backward pass of one projection leave for
/// `lora_linear_sum`, with activations stored as `element`: each is written once and read once.
pub fn partial_sums(
    element: Element,
    tokens: u32,
    in_features: u32,
    projection: &Projection,
) -> u64 {
    let Some(lora) = &projection.lora else {
        return 0;
    };
    let h = Split::new(Pass::H, element, tokens, in_features);
    let dy = Split::new(Pass::DhDb, element, tokens, projection.out_features);
    let da = Split::new(Pass::Da, element, tokens, in_features);
    h.row_partials(lora)
        + dy.row_partials(lora)
        + dy.column_partials(lora)
        + da.column_partials(lora)
}

/// One pass over `z`, an address of `split`'s activations, for each of `sides`, at most
/// `LORA_MAX_GROUP`.
pub(super) fn pass(
    kernels: &Kernels,
    pass: Pass,
    element: Element,
    split: &Split,
    z: u64,
    sides: &[LoraSide],
) -> Result<(), LaunchError> {
    let rank = sides.iter().map(|side| side.rank).max().unwrap_or(0);
    if rank == 0 || split.tokens == 0 || split.features == 0 {
        return Ok(());
    }
    let (ranks, shared) = match (element, pass) {
        (Element::F32, _) => (LORA_PASS_F32_RANKS, 0),
        (_, Pass::H) => (LORA_PASS_RANKS, LORA_PASS_H_SHARED),
        (_, Pass::Dh) => (LORA_PASS_RANKS, LORA_PASS_DH_SHARED),
        (_, Pass::DhDb) => (LORA_PASS_RANKS, LORA_PASS_DH_DB_SHARED),
        (_, Pass::Da) => (LORA_PASS_RANKS, LORA_PASS_DA_SHARED),
    };
    let rank_blocks = rank.div_ceil(ranks);
    let mut group = [LoraSide::default(); LORA_MAX_GROUP as usize];
    group[..sides.len()].copy_from_slice(sides);
    let shape = LoraPass {
        sides: group,
        z,
        tokens: split.tokens as u32,
        features: split.features as u32,
        block_tokens: split.block_tokens as u32,
        block_features: split.block_features as u32,
        rank_blocks,
    };
    let config = LaunchConfig {
        grid_dim: (
            sides.len() as u32 * rank_blocks,
            blocks("features", split.features, split.block_features, GRID_YZ)?,
            blocks("tokens", split.tokens, split.block_tokens, GRID_YZ)?,
        ),
        block_dim: (LORA_THREADS, 1, 1),
        shared_mem_bytes: shared,
    };
    let by_storage = match pass {
        Pass::H => modules::LORA_LINEAR_H,
        Pass::Dh => modules::LORA_LINEAR_DH,
        Pass::DhDb => modules::LORA_LINEAR_DH_DB,
        Pass::Da => modules::LORA_LINEAR_DA,
    };
    let function = kernels.function_with_shared(by_storage.of("x", element)?, shared)?;
    let mut launch = kernels.stream().launch_builder(&function);
    launch.arg(&shape);
    // SAFETY: the argument is the kernel's parameter; the callers checked every length against the
    // split, and the workspace holds the partial sums.
    unsafe { launch.launch(config) }?;
    Ok(())
}

/// Adds up partial sums, at most `LORA_MAX_SUMS` of them.
pub(super) fn sum(kernels: &Kernels, sums: &[LoraSum]) -> Result<(), LaunchError> {
    let longest = sums.iter().map(|sum| sum.count).max().unwrap_or(0);
    if longest == 0 {
        return Ok(());
    }
    let mut all = LoraSums {
        sums: [LoraSum::default(); LORA_MAX_SUMS as usize],
    };
    all.sums[..sums.len()].copy_from_slice(sums);
    let config = LaunchConfig {
        grid_dim: (
            blocks("partials", longest, u64::from(4 * LORA_SUM_THREADS), GRID_X)?,
            sums.len() as u32,
            1,
        ),
        block_dim: (LORA_SUM_THREADS, 1, 1),
        shared_mem_bytes: 0,
    };
    let function = kernels.function(&modules::LORA_LINEAR_SUM)?;
    let mut launch = kernels.stream().launch_builder(&function);
    launch.arg(&all);
    // SAFETY: the argument is the kernel's parameter; the callers checked every output, and the
    // workspace holds the partial sums.
    unsafe { launch.launch(config) }?;
    Ok(())
}
