//! Launches `product_f32.cu`: the products with the frozen weight, the update in the same tile.

use crate::abi::{LORA_MAX_GROUP, LORA_THREADS, LoraProduct, LoraTerm};
use crate::launch::{GRID_X, GRID_YZ, blocks};
use crate::modules::{self, Kernel};
use crate::{Element, Kernels, LaunchError};
use cudarc::driver::{LaunchConfig, PushKernelArg};

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
    let (kernel, config) = match choose(element, rows, cols)? {
        None => return Ok(()),
        Some((Tile::Edge64, config)) => (&modules::LORA_LINEAR_FORWARD_F32_64, config),
        Some((Tile::Edge128, config)) => (&modules::LORA_LINEAR_FORWARD_F32_128, config),
    };
    launch(kernels, kernel, config, rows, cols, &[term], &[bias, y])
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
    let (kernel, config) = match choose(element, rows, cols)? {
        None => return Ok(()),
        Some((Tile::Edge64, config)) => (&modules::LORA_LINEAR_DX_F32_64, config),
        Some((Tile::Edge128, config)) => (&modules::LORA_LINEAR_DX_F32_128, config),
    };
    launch(kernels, kernel, config, rows, cols, terms, &[dx])
}

enum Tile {
    Edge64,
    Edge128,
}

/// The tile for a result of `rows x cols` and the grid that covers it; nothing where it is empty.
fn choose(
    element: Element,
    rows: u32,
    cols: u32,
) -> Result<Option<(Tile, LaunchConfig)>, LaunchError> {
    if element != Element::F32 {
        return Err(LaunchError::Element {
            tensor: "x",
            expected: Element::F32,
            found: element,
        });
    }
    if rows == 0 || cols == 0 {
        return Ok(None);
    }
    let tiles = |edge: u32| u64::from(rows.div_ceil(edge)) * u64::from(cols.div_ceil(edge));
    let (tile, edge) = match tiles(128) >= MANY_TILES {
        true => (Tile::Edge128, 128),
        false => (Tile::Edge64, 64),
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
    Ok(Some((tile, config)))
}

fn launch(
    kernels: &Kernels,
    kernel: &'static Kernel,
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
    let function = kernels.function(kernel)?;
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
