//! The unfused f32 matrix product. Launches `matmul.cu`.

use crate::abi::{MATMUL_THREADS, MATMUL_TILE, MatmulShape};
use crate::launch::{GRID_X, GRID_YZ, blocks, launch};
use crate::modules::{self, Kernel};
use crate::{Element, Kernels, LaunchError, Operand, OperandMut};

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

impl Layout {
    fn kernel(self) -> &'static Kernel {
        match self {
            Layout::Nn => &modules::MATMUL_F32_NN,
            Layout::Nt => &modules::MATMUL_F32_NT,
            Layout::Tn => &modules::MATMUL_F32_TN,
        }
    }
}

/// `c [m, n] = a [m, k] · b [k, n]` in f32, with the factors held as `layout` says.
///
/// # Errors
/// When a length or type does not fit `shape`, when `shape` is beyond what a grid covers, or when the
/// driver refuses.
pub fn matmul(
    kernels: &Kernels,
    layout: Layout,
    shape: MatmulShape,
    a: Operand,
    b: Operand,
    c: OperandMut,
) -> Result<(), LaunchError> {
    let [m, n, k] = [shape.m, shape.n, shape.k].map(u64::from);
    a.check("a", Element::F32, m * k)?;
    b.check("b", Element::F32, k * n)?;
    c.check("c", Element::F32, m * n)?;
    if c.is_empty() {
        return Ok(());
    }
    let tile = u64::from(MATMUL_TILE);
    let grid = (
        blocks("n", n, tile, GRID_X)?,
        blocks("m", m, tile, GRID_YZ)?,
        1,
    );
    let block = (MATMUL_THREADS, 1, 1);
    // SAFETY: the kernel's parameters in order, and every length was checked against the shape.
    unsafe {
        launch!(
            kernels,
            layout.kernel(),
            grid,
            block,
            a.address(),
            b.address(),
            c.address(),
            shape,
        );
    }
    Ok(())
}
