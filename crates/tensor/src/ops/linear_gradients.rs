//! Gradients of a linear layer's own parameters, where they are trained too: of `y = x·Wᵀ + bias`,
//! `dW += dyᵀ·x` and `dbias += Σ dy`.

#[cfg(feature = "cuda")]
use crate::cuda::extents;
use crate::{
    DType, Result, Tensor, check,
    matrix::{Matrix, MatrixMut, Term, Write, multiply},
    simd,
};
#[cfg(feature = "cuda")]
use fuselora_kernels::{abi::ColumnSumShape, linear_gradients};
use rayon::prelude::*;

/// Rows of the weight's gradient that make one task.
const ROW_BLOCK: usize = 64;

/// `dw += dyᵀ·x`, with `dy [tokens, out]` and `x [tokens, in]` of one float type (F32 on the CPU), `dw [out, in]` F32.
///
/// # Errors
/// On shapes, data types and devices that do not fit.
pub fn weight(dy: &Tensor, x: &Tensor, dw: &mut Tensor) -> Result<()> {
    let (tokens, in_features) = x.matrix("x", "[tokens, in_features]")?;
    let (out_features, _) = dw.matrix("dw", "[out_features, in_features]")?;
    dw.check_shape("dw", &[out_features, in_features])?;
    dy.check_shape("dy", &[tokens, out_features])?;
    check::devices(dw.device(), [("dy", dy), ("x", x)])?;
    dw.check_dtype("dw", DType::F32)?;
    #[cfg(feature = "cuda")]
    if !dw.device().is_cpu() {
        let [tokens, out_features, in_features] =
            extents("dw", [tokens, out_features, in_features])?;
        return dy.device().launch(|kernels| {
            let (dy, x, dw) = (dy.operand(), x.operand(), dw.operand_mut());
            linear_gradients::weight(kernels, tokens, out_features, in_features, dy, x, dw)
        });
    }
    let device = dw.device().clone();
    let dy = Matrix::new(dy.f32("dy")?, tokens, out_features);
    let x = Matrix::new(x.f32("x")?, tokens, in_features);
    let tiles =
        MatrixMut::new(dw.f32_mut("dw")?, out_features, in_features).tiles(ROW_BLOCK, in_features);
    tiles.into_par_iter().try_for_each(|mut tile| {
        let product = Term::new(dy.column_block(tile.rows()).transposed(), x);
        multiply(&mut tile.matrix, Write::Add, &[product], &device)
    })
}

/// `db += scale · Σ dy`, with `dy [tokens, out]` of a float type (F32 on the CPU) and `db [out]` F32.
///
/// # Errors
/// On shapes, data types and devices that do not fit.
pub fn bias(dy: &Tensor, scale: f32, db: &mut Tensor) -> Result<()> {
    let (_, out_features) = dy.matrix("dy", "[tokens, out_features]")?;
    db.check_shape("db", &[out_features])?;
    db.check_device("db", dy.device())?;
    db.check_dtype("db", DType::F32)?;
    #[cfg(feature = "cuda")]
    if !dy.device().is_cpu() {
        let [tokens, features] = extents("dy", [dy.shape()[0], out_features])?;
        let shape = ColumnSumShape { tokens, features };
        return dy.device().launch(|kernels| {
            linear_gradients::bias(kernels, shape, dy.operand(), scale, db.operand_mut())
        });
    }
    let (dy, db) = (dy.f32("dy")?, db.f32_mut("db")?);
    simd::vectorize(
        #[inline(always)]
        || {
            for dy in dy.chunks_exact(out_features.max(1)) {
                simd::axpy(scale, dy, db);
            }
        },
    );
    Ok(())
}
