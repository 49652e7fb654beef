//! The unfused matrix product. Launches `matmul.cu`, and `matmul_16bit.cu` for f16 and bf16.

use crate::abi::{MATMUL_THREADS, MATMUL_TILE, MatmulShape};
use crate::gemm::{ByTile, are_aligned, by_tile};
use crate::launch::{GRID_X, GRID_YZ, blocks, check_row};
use crate::modules::{self, Kernel};
use crate::{Element, Kernels, LaunchError, Operand, OperandMut};
use cudarc::driver::{CudaFunction, LaunchConfig, PushKernelArg};

/// Which factor is held transposed in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `a [m, k]`, `b [k, n]`.
    Nn,
    /// `a [m, k]`, `b [n, k]`: activations times a linear layer's weight `[out, in]`.
    Nt,
    /// `a [k, m]`, `b [k, n]`: a weight's gradient from two `[tokens, features]`.
    Tn,
}

const NN: ByTile = by_tile!(
    MATMUL_F16_NN_LARGE,
    MATMUL_F16_NN_SMALL,
    MATMUL_F16_NN_UNALIGNED,
    MATMUL_BF16_NN_LARGE,
    MATMUL_BF16_NN_SMALL,
    MATMUL_BF16_NN_UNALIGNED,
);
const NT: ByTile = by_tile!(
    MATMUL_F16_NT_LARGE,
    MATMUL_F16_NT_SMALL,
    MATMUL_F16_NT_UNALIGNED,
    MATMUL_BF16_NT_LARGE,
    MATMUL_BF16_NT_SMALL,
    MATMUL_BF16_NT_UNALIGNED,
);

/// `c [m, n] = a [m, k] · b [k, n]` with the factors held as `layout` says: all f32, or, but for
/// [`Layout::Tn`], all f16 or all bf16. Sums are f32.
///
/// # Errors
/// When a length or type does not fit `shape` and `layout`, when `shape` is beyond what a grid covers, or when
/// the driver refuses.
pub fn matmul(
    kernels: &Kernels,
    layout: Layout,
    shape: MatmulShape,
    a: Operand,
    b: Operand,
    c: OperandMut,
) -> Result<(), LaunchError> {
    let [m, n, k] = [shape.m, shape.n, shape.k].map(u64::from);
    for (extent, elements) in [("m", m), ("n", n), ("k", k)] {
        check_row(extent, elements)?;
    }
    let element = match layout {
        Layout::Tn => Element::F32,
        Layout::Nn | Layout::Nt => a.element(),
    };
    a.check("a", element, m * k)?;
    b.check("b", element, k * n)?;
    c.check("c", element, m * n)?;
    if c.is_empty() {
        return Ok(());
    }
    let (function, config) = match (element, layout) {
        (Element::F32, Layout::Nn) => in_f32(kernels, &modules::MATMUL_F32_NN, shape)?,
        (Element::F32, Layout::Nt) => in_f32(kernels, &modules::MATMUL_F32_NT, shape)?,
        (_, Layout::Tn) => in_f32(kernels, &modules::MATMUL_F32_TN, shape)?,
        (_, Layout::Nn | Layout::Nt) => {
            let addresses = [a.address(), b.address(), c.address()];
            let aligned = are_aligned(&addresses, &[shape.k, shape.n]);
            let by_tile = if layout == Layout::Nn { NN } else { NT };
            by_tile.choose(kernels, "a", element, shape.m, shape.n, aligned)?
        }
    };
    let (a, b, c) = (a.address(), b.address(), c.address());
    let mut launch = kernels.stream().launch_builder(&function);
    launch.arg(&a).arg(&b).arg(&c).arg(&shape);
    // SAFETY: the kernel's parameters in order, and every length was checked against the shape.
    unsafe { launch.launch(config) }?;
    Ok(())
}

/// A kernel of tiles of `tile_f32.cuh` and its launch, for a result of `shape`.
pub(crate) fn in_f32(
    kernels: &Kernels,
    kernel: &'static Kernel,
    shape: MatmulShape,
) -> Result<(CudaFunction, LaunchConfig), LaunchError> {
    let tile = u64::from(MATMUL_TILE);
    let config = LaunchConfig {
        grid_dim: (
            blocks("n", shape.n.into(), tile, GRID_X)?,
            blocks("m", shape.m.into(), tile, GRID_YZ)?,
            1,
        ),
        block_dim: (MATMUL_THREADS, 1, 1),
        shared_mem_bytes: 0,
    };
    Ok((kernels.function(kernel)?, config))
}
