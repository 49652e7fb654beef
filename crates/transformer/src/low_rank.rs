//! Decompositions of a weight that keep a few directions: what is not computed in a training step, on the host, in f64.

use nalgebra::{DMatrix, SymmetricEigen};
use rand::Rng;

use crate::error::{Error, Result};
use crate::random::gaussian;

/// A matrix in f64.
pub(crate) type Matrix = DMatrix<f64>;

/// The largest singular values of a matrix with their vectors: `u [rows, rank]`, `v [rank, columns]`.
pub(crate) struct Svd {
    pub u: Matrix,
    pub s: Vec<f64>,
    pub v: Matrix,
}

/// A matrix of row-major values.
///
/// # Errors
/// Where one is not finite: no decomposition of it would end.
pub(crate) fn matrix(values: &[f32], rows: usize, columns: usize) -> Result<Matrix> {
    if values.iter().any(|value| !value.is_finite()) {
        return Err(Error::Input(
            "a matrix with a NaN or infinity in it cannot be decomposed".into(),
        ));
    }
    let values = values.iter().map(|&value| f64::from(value));
    Ok(Matrix::from_row_iterator(rows, columns, values))
}

/// The row-major values of a matrix.
pub(crate) fn row_major(matrix: &Matrix) -> Vec<f32> {
    let transposed = matrix.transpose();
    transposed.iter().map(|&value| value as f32).collect()
}

/// The `rank` largest singular values, from the eigenvectors of `W·Wᵀ`: in f64 those of f32 weights lose nothing by it.
///
/// A singular value of zero has a zero row of `v`.
pub(crate) fn svd(w: &Matrix, rank: usize) -> Svd {
    if w.nrows() > w.ncols() {
        let Svd { u, s, v } = svd(&w.transpose(), rank);
        return Svd {
            u: v.transpose(),
            s,
            v: u.transpose(),
        };
    }
    let eigen = SymmetricEigen::new(w * w.transpose());
    let mut order: Vec<usize> = (0..w.nrows()).collect();
    order.sort_by(|&i, &j| eigen.eigenvalues[j].total_cmp(&eigen.eigenvalues[i]));
    order.truncate(rank);
    let u = eigen.eigenvectors.select_columns(&order);
    let mut v = u.tr_mul(w);
    let mut s = Vec::with_capacity(order.len());
    for mut row in v.row_iter_mut() {
        let norm = row.norm();
        if norm > 0.0 {
            row /= norm;
        }
        s.push(norm);
    }
    Svd { u, s, v }
}

/// An estimate of [`svd`] from `rank` random directions, each iteration of which turns them towards the largest
/// (algorithms 4.4 and 5.1 of Halko et al. 2011, as `torch.svd_lowrank` has them).
pub(crate) fn randomized_svd(
    w: &Matrix,
    rank: usize,
    iterations: usize,
    random: &mut impl Rng,
) -> Svd {
    if w.nrows() < w.ncols() {
        let Svd { u, s, v } = randomized_svd(&w.transpose(), rank, iterations, random);
        return Svd {
            u: v.transpose(),
            s,
            v: u.transpose(),
        };
    }
    let directions = gaussian_matrix(w.ncols(), rank, random);
    let mut q = orthonormal(w * directions);
    for _ in 0..iterations {
        q = orthonormal(w.tr_mul(&q));
        q = orthonormal(w * q);
    }
    let Svd { u, s, v } = svd(&q.tr_mul(w), rank);
    Svd { u: q * u, s, v }
}

/// The first `rank` columns of Q and rows of R of `W = Q·R`.
pub(crate) fn qr(w: Matrix, rank: usize) -> (Matrix, Matrix) {
    let qr = w.qr();
    (
        qr.q().columns(0, rank).into_owned(),
        qr.r().rows(0, rank).into_owned(),
    )
}

/// An orthonormal basis of the columns.
pub(crate) fn orthonormal(columns: Matrix) -> Matrix {
    columns.qr().q()
}

/// Values of the standard normal distribution.
pub(crate) fn gaussian_matrix(rows: usize, columns: usize, random: &mut impl Rng) -> Matrix {
    Matrix::from_fn(rows, columns, |_, _| gaussian(random))
}
