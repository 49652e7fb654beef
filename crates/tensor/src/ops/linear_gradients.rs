//! Gradients of a linear layer's own parameters, where they are trained too: of `y = x·Wᵀ + bias`,
//! `dW += dyᵀ·x` and `dbias += Σ dy`.

use crate::{
    Result, Tensor, check,
    matrix::{Matrix, MatrixMut, Term, Write, multiply},
    simd,
};
use rayon::prelude::*;

/// Rows of the weight's gradient that make one task.
const ROW_BLOCK: usize = 64;

/// `dw += dyᵀ·x`, with `dy [tokens, out]`, `x [tokens, in]` and `dw [out, in]`, all F32.
///
/// # Errors
/// On shapes, data types and devices that do not fit.
pub fn weight(dy: &Tensor, x: &Tensor, dw: &mut Tensor) -> Result<()> {
    let (tokens, in_features) = x.matrix("x", "[tokens, in_features]")?;
    let (out_features, _) = dw.matrix("dw", "[out_features, in_features]")?;
    dw.check_shape("dw", &[out_features, in_features])?;
    dy.check_shape("dy", &[tokens, out_features])?;
    check::devices(dw.device(), [("dy", dy), ("x", x)])?;
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

/// `db += scale · Σ dy`, with `dy [tokens, out]` and `db [out]`, both F32.
///
/// # Errors
/// On shapes, data types and devices that do not fit.
pub fn bias(dy: &Tensor, scale: f32, db: &mut Tensor) -> Result<()> {
    let (_, out_features) = dy.matrix("dy", "[tokens, out_features]")?;
    db.check_shape("db", &[out_features])?;
    db.check_device("db", dy.device())?;
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
