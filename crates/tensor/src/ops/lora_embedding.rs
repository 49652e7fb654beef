//! The low-rank update of an embedding: `y[i] += scaling · B·A[:, ids[i]]`, with `A [rank, tokens]`, `B [width, rank]`.

use crate::{
    DType, Result, Tensor, check,
    matrix::{Matrix, MatrixMut, Term, Write, multiply},
};

/// A low-rank update `scaling·B·A` of an embedding, transposed.
#[derive(Clone, Copy)]
pub struct Update<'a> {
    /// `[rank, tokens]` F32: a column for each token that the embedding knows.
    pub a: &'a Tensor,
    /// `[width, rank]` F32.
    pub b: &'a Tensor,
    /// Factor of the update.
    pub scaling: f32,
}

impl Update<'_> {
    /// Rank, tokens that the embedding knows, width.
    fn check(&self, ids: &Tensor) -> Result<(usize, usize, usize)> {
        let (rank, tokens) = self.a.matrix("lora_a", "[rank, tokens]")?;
        let (width, _) = self.b.matrix("lora_b", "[width, rank]")?;
        self.b.check_shape("lora_b", &[width, rank])?;
        check::devices(ids.device(), [("lora_a", self.a), ("lora_b", self.b)])?;
        check::indices("ids", ids, tokens)?;
        Ok((rank, tokens, width))
    }
}

/// Adds the update to `y [n, width]` (F32 on the CPU, of a float type elsewhere) of `ids [n]` U32, and returns what
/// backward needs: `A[:, ids]ᵀ`, `[n, rank]` F32.
///
/// # Errors
/// When an id is no column of A, and on shapes, data types and devices that do not fit.
pub fn forward(ids: &Tensor, update: Update, y: &mut Tensor) -> Result<Tensor> {
    let n = ids.vector("ids", "[n]")?;
    let (rank, tokens, width) = update.check(ids)?;
    y.check_shape("y", &[n, width])?;
    y.check_device("y", ids.device())?;
    let device = ids.device();
    #[cfg(feature = "cuda")]
    if !device.is_cpu() {
        return on_cuda::forward(ids, &update, [rank, tokens, width], y);
    }
    let mut h = Tensor::empty(device, [n, rank], DType::F32)?;
    let a = update.a.f32("lora_a")?;
    for (h, &id) in h
        .as_f32_mut()?
        .chunks_exact_mut(rank.max(1))
        .zip(ids.u32("ids")?)
    {
        for (h, row) in h.iter_mut().zip(a.chunks_exact(tokens)) {
            *h = row[id as usize];
        }
    }
    let product = Term {
        lhs: Matrix::new(h.as_f32()?, n, rank),
        rhs: Matrix::new(update.b.f32("lora_b")?, width, rank).transposed(),
        scale: update.scaling,
    };
    let mut y = MatrixMut::new(y.f32_mut("y")?, n, width);
    multiply(&mut y, Write::Add, &[product], device)?;
    Ok(h)
}

/// The backward pass: `da[:, ids[i]] += scaling · Bᵀ·dy[i]`, `db += scaling · dyᵀ·h`, with `dy [n, width]` as `y` was
/// and the `h` that [`forward`] returned. An id may repeat.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    dy: &Tensor,
    ids: &Tensor,
    update: Update,
    h: &Tensor,
    da: &mut Tensor,
    db: &mut Tensor,
) -> Result<()> {
    let n = ids.vector("ids", "[n]")?;
    let (rank, tokens, width) = update.check(ids)?;
    dy.check_shape("dy", &[n, width])?;
    h.check_shape("h", &[n, rank])?;
    da.check_shape("da", &[rank, tokens])?;
    db.check_shape("db", &[width, rank])?;
    check::devices(ids.device(), [("dy", dy), ("h", h), ("da", da), ("db", db)])?;
    let device = ids.device();
    #[cfg(feature = "cuda")]
    if !device.is_cpu() {
        return on_cuda::backward(dy, ids, &update, [rank, tokens, width], h, [da, db]);
    }
    let dy = Matrix::new(dy.f32("dy")?, n, width);
    let mut dh = Tensor::empty(device, [n, rank], DType::F32)?;
    let product = Term {
        lhs: dy,
        rhs: Matrix::new(update.b.f32("lora_b")?, width, rank),
        scale: update.scaling,
    };
    let mut target = MatrixMut::new(dh.as_f32_mut()?, n, rank);
    multiply(&mut target, Write::Replace, &[product], device)?;
    let product = Term {
        lhs: dy.transposed(),
        rhs: Matrix::new(h.f32("h")?, n, rank),
        scale: update.scaling,
    };
    let mut target = MatrixMut::new(db.f32_mut("db")?, width, rank);
    multiply(&mut target, Write::Add, &[product], device)?;
    let da = da.f32_mut("da")?;
    for (dh, &id) in dh.as_f32()?.chunks_exact(rank.max(1)).zip(ids.u32("ids")?) {
        for (dh, row) in dh.iter().zip(da.chunks_exact_mut(tokens)) {
            row[id as usize] += dh;
        }
    }
    Ok(())
}

#[cfg(feature = "cuda")]
mod on_cuda {
    use super::{DType, Result, Tensor, Update};
    use crate::cuda::extents;
    use crate::ops::{elementwise, linear_gradients};
    use fuselora_kernels::abi::{EmbeddingShape, MatmulShape};
    use fuselora_kernels::embedding::{gather_transposed, scatter_add_transposed};
    use fuselora_kernels::matmul::{Layout, matmul};

    /// For checked tensors; `shape` is rank, tokens that the embedding knows, width.
    pub fn forward(
        ids: &Tensor,
        update: &Update,
        shape: [usize; 3],
        y: &mut Tensor,
    ) -> Result<Tensor> {
        let device = ids.device();
        let mut h = Tensor::empty(device, [ids.element_count(), shape[0]], DType::F32)?;
        let [rank, tokens, width] = extents("lora_a", shape)?;
        let [n] = extents("ids", [ids.element_count()])?;
        let mut delta = Tensor::empty(device, y.shape(), DType::F32)?;
        let table = EmbeddingShape {
            rows: tokens,
            width: rank,
        };
        let product = MatmulShape {
            m: n,
            n: width,
            k: rank,
        };
        device.launch(|kernels| {
            let a = update.a.operand();
            gather_transposed(kernels, table, a, ids.operand(), h.operand_mut())?;
            let (h, b) = (h.operand(), update.b.operand());
            matmul(kernels, Layout::Nt, product, h, b, delta.operand_mut())
        })?;
        elementwise::scale(&mut delta, update.scaling)?;
        match y.dtype() {
            DType::F32 => elementwise::add_assign(y, &delta)?,
            other => elementwise::add_assign(y, &delta.cast(other)?)?,
        }
        Ok(h)
    }

    /// As [`forward`]; adds to the gradients of A and B.
    pub fn backward(
        dy: &Tensor,
        ids: &Tensor,
        update: &Update,
        shape: [usize; 3],
        h: &Tensor,
        [da, db]: [&mut Tensor; 2],
    ) -> Result<()> {
        let device = ids.device();
        let [rank, tokens, width] = extents("lora_a", shape)?;
        let [n] = extents("ids", [ids.element_count()])?;
        let mut dy = dy.cast(DType::F32)?;
        elementwise::scale(&mut dy, update.scaling)?;
        linear_gradients::weight(&dy, h, db)?;
        let mut dh = Tensor::empty(device, h.shape(), DType::F32)?;
        let product = MatmulShape {
            m: n,
            n: rank,
            k: width,
        };
        let table = EmbeddingShape {
            rows: tokens,
            width: rank,
        };
        device.launch(|kernels| {
            let b = update.b.operand();
            matmul(
                kernels,
                Layout::Nn,
                product,
                dy.operand(),
                b,
                dh.operand_mut(),
            )?;
            let (dh, ids) = (dh.operand(), ids.operand());
            scatter_add_transposed(kernels, table, dh, ids, da.operand_mut())
        })
    }
}
