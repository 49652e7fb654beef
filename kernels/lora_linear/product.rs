//! Launches `product_f32.cu`, `product_16bit.cu` and `skinny_16bit.cu`: the products with the frozen weight, the
//! update in the same tile.

use crate::abi::{LORA_MAX_GROUP, LORA_SKINNY_OUTS, LORA_THREADS, LoraProduct, LoraTerm, Nf4Gemv};
use crate::gemm::{ByTile, are_aligned, by_tile};
use crate::launch::{GRID_X, GRID_YZ, blocks};
use crate::modules::{self, Kernel};
use crate::{Element, Kernels, LaunchError, nf4};
use cudarc::driver::{CudaFunction, LaunchConfig, PushKernelArg};

const FORWARD: ByTile = by_tile!(
    LORA_LINEAR_FORWARD_F16_LARGE,
    LORA_LINEAR_FORWARD_F16_SMALL,
    LORA_LINEAR_FORWARD_F16_UNALIGNED,
    LORA_LINEAR_FORWARD_BF16_LARGE,
    LORA_LINEAR_FORWARD_BF16_SMALL,
    LORA_LINEAR_FORWARD_BF16_UNALIGNED,
);
const DX: ByTile = by_tile!(
    LORA_LINEAR_DX_F16_LARGE,
    LORA_LINEAR_DX_F16_SMALL,
    LORA_LINEAR_DX_F16_UNALIGNED,
    LORA_LINEAR_DX_BF16_LARGE,
    LORA_LINEAR_DX_BF16_SMALL,
    LORA_LINEAR_DX_BF16_UNALIGNED,
);
const NF4_FORWARD: ByTile = by_tile!(
    NF4_LORA_LINEAR_FORWARD_F16_LARGE,
    NF4_LORA_LINEAR_FORWARD_F16_SMALL,
    NF4_LORA_LINEAR_FORWARD_F16_UNALIGNED,
    NF4_LORA_LINEAR_FORWARD_BF16_LARGE,
    NF4_LORA_LINEAR_FORWARD_BF16_SMALL,
    NF4_LORA_LINEAR_FORWARD_BF16_UNALIGNED,
);
const NF4_DX: ByTile = by_tile!(
    NF4_LORA_LINEAR_DX_F16_LARGE,
    NF4_LORA_LINEAR_DX_F16_SMALL,
    NF4_LORA_LINEAR_DX_F16_UNALIGNED,
    NF4_LORA_LINEAR_DX_BF16_LARGE,
    NF4_LORA_LINEAR_DX_BF16_SMALL,
    NF4_LORA_LINEAR_DX_BF16_UNALIGNED,
);

/// Below this many tiles of 128 x 128 a GPU is better filled by smaller ones.
const MANY_TILES: u64 = 64;

/// `y [tokens, out] = x·Wᵀ + scaling·h·Bᵀ + bias`. `bias` may be the address 0.
pub(super) fn forward(
    kernels: &Kernels,
    element: Element,
    rows: u32,
    cols: u32,
    term: LoraTerm,
    bias: u64,
    y: u64,
) -> Result<(), LaunchError> {
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let few = Nf4Gemv {
        weight: term.quantized,
        x: term.left,
        h: term.left_low,
        lora_b: term.right_low,
        bias,
        y,
        tokens: rows,
        in_features: term.depth,
        out_features: cols,
        rank: term.rank,
        scaling: term.scaling,
    };
    let nf4 = term.is_quantized();
    if nf4 && few.fits() {
        return nf4::gemv(kernels, element, few);
    }
    let (function, config) = match element {
        Element::F32 => {
            let edges = match nf4 {
                false => [
                    &modules::LORA_LINEAR_FORWARD_F32_64,
                    &modules::LORA_LINEAR_FORWARD_F32_128,
                ],
                true => [
                    &modules::NF4_LORA_LINEAR_FORWARD_F32_64,
                    &modules::NF4_LORA_LINEAR_FORWARD_F32_128,
                ],
            };
            choose_f32(kernels, edges, rows, cols)?
        }
        _ => {
            let aligned = are_aligned(&[term.left, term.right, y], &[term.depth, cols]);
            match (nf4, aligned && rows <= 16) {
                (true, _) => NF4_FORWARD.choose(kernels, "x", element, rows, cols, aligned)?,
                (false, true) => choose_skinny(kernels, element, rows, cols)?,
                (false, false) => FORWARD.choose(kernels, "x", element, rows, cols, aligned)?,
            }
        }
    };
    launch(kernels, function, config, rows, cols, &[term], &[bias, y])
}

/// `dx [tokens, in] = Σ dy·W + drop(dh·A)` over at most `LORA_MAX_GROUP` terms.
pub(super) fn dx(
    kernels: &Kernels,
    element: Element,
    rows: u32,
    cols: u32,
    terms: &[LoraTerm],
    dx: u64,
) -> Result<(), LaunchError> {
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let quantized = terms.iter().filter(|term| term.is_quantized()).count();
    if quantized > 0 && quantized < terms.len() {
        return Err(LaunchError::Parameter {
            parameter: "quantized projections",
            found: quantized as u64,
            expected: "all that share an input's gradient must be, or none",
        });
    }
    let nf4 = quantized > 0;
    let (function, config) = match element {
        Element::F32 => {
            let edges = match nf4 {
                false => [
                    &modules::LORA_LINEAR_DX_F32_64,
                    &modules::LORA_LINEAR_DX_F32_128,
                ],
                true => [
                    &modules::NF4_LORA_LINEAR_DX_F32_64,
                    &modules::NF4_LORA_LINEAR_DX_F32_128,
                ],
            };
            choose_f32(kernels, edges, rows, cols)?
        }
        _ => {
            let aligned = terms
                .iter()
                .all(|term| are_aligned(&[term.left, term.right, dx], &[term.depth, cols]));
            let by_tile = if nf4 { &NF4_DX } else { &DX };
            by_tile.choose(kernels, "x", element, rows, cols, aligned)?
        }
    };
    launch(kernels, function, config, rows, cols, terms, &[dx])
}

impl LoraTerm {
    /// Whether the weight is NF4: a block of it then has elements.
    fn is_quantized(&self) -> bool {
        self.quantized.log2_block_size > 0
    }
}

/// The kernel, of those for tiles of 64 and of 128, for a result of `rows x cols`, and the grid that covers it.
fn choose_f32(
    kernels: &Kernels,
    [edge_64, edge_128]: [&'static Kernel; 2],
    rows: u32,
    cols: u32,
) -> Result<(CudaFunction, LaunchConfig), LaunchError> {
    let tiles = |edge: u32| u64::from(rows.div_ceil(edge)) * u64::from(cols.div_ceil(edge));
    let (kernel, edge) = match tiles(128) >= MANY_TILES {
        true => (edge_128, 128),
        false => (edge_64, 64),
    };
    let config = LaunchConfig {
        grid_dim: (
            blocks("features", cols.into(), edge, GRID_X)?,
            blocks("tokens", rows.into(), edge, GRID_YZ)?,
            1,
        ),
        block_dim: (LORA_THREADS, 1, 1),
        shared_mem_bytes: 0,
    };
    Ok((kernels.function(kernel)?, config))
}

/// The kernel for a result of at most 16 rows.
fn choose_skinny(
    kernels: &Kernels,
    element: Element,
    rows: u32,
    cols: u32,
) -> Result<(CudaFunction, LaunchConfig), LaunchError> {
    let kernel = match (element, rows <= 8) {
        (Element::F16, true) => &modules::LORA_LINEAR_SKINNY_F16_8,
        (Element::F16, false) => &modules::LORA_LINEAR_SKINNY_F16_16,
        (_, true) => &modules::LORA_LINEAR_SKINNY_BF16_8,
        (_, false) => &modules::LORA_LINEAR_SKINNY_BF16_16,
    };
    let config = LaunchConfig {
        grid_dim: (
            blocks("features", cols.into(), LORA_SKINNY_OUTS.into(), GRID_X)?,
            1,
            1,
        ),
        block_dim: (LORA_THREADS, 1, 1),
        shared_mem_bytes: 0,
    };
    Ok((kernels.function(kernel)?, config))
}

fn launch(
    kernels: &Kernels,
    function: CudaFunction,
    config: LaunchConfig,
    rows: u32,
    cols: u32,
    terms: &[LoraTerm],
    addresses: &[u64],
) -> Result<(), LaunchError> {
    let mut group = [LoraTerm::default(); LORA_MAX_GROUP as usize];
    group[..terms.len()].copy_from_slice(terms);
    let shape = LoraProduct {
        terms: group,
        count: terms.len() as u32,
        rows,
        cols,
    };
    let mut launch = kernels.stream().launch_builder(&function);
    launch.arg(&shape);
    for address in addresses {
        launch.arg(address);
    }
    // SAFETY: the arguments are the kernel's parameters in order, and the callers checked every
    // length against the shape.
    unsafe { launch.launch(config) }?;
    Ok(())
}
