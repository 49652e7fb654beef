use super::{Backward, Gradients, Lora};
use crate::{
    DType, Device, Result, Tensor,
    matrix::{Matrix, MatrixMut, Tile, Write, multiply},
    simd,
};
use rayon::prelude::*;

/// The extents of a tile of `dx`.
const TOKEN_BLOCK: usize = 512;
const IN_BLOCK: usize = 192;
/// Rows of a weight that are decoded at a time where it is not stored in F32.
const DECODE_BLOCK: usize = 256;
/// Rows or columns of a low-rank gradient that make one task.
const GRADIENT_BLOCK: usize = 64;

pub(super) fn run(x: &Tensor, items: &mut [Backward], need_dx: bool) -> Result<Option<Tensor>> {
    let (tokens, in_features) = x.matrix("x", "[tokens, in_features]")?;
    let mut updates = Vec::with_capacity(items.len());
    for item in items.iter_mut() {
        updates.push(update_gradients(x, item)?);
    }
    if !need_dx {
        return Ok(None);
    }
    let device = x.device();
    let mut terms = Vec::with_capacity(items.len());
    for (item, dh) in items.iter().zip(&updates) {
        let out_features = item.projection.weight.out_features();
        let update = match (item.projection.lora, dh) {
            (Some(lora), Some(dh)) => Some((
                lora,
                Matrix::new(dh.as_f32()?, tokens, lora.rank()),
                Matrix::new(lora.a.as_f32()?, lora.rank(), in_features),
            )),
            _ => None,
        };
        terms.push(Term {
            item,
            dy: Matrix::new(item.dy.as_f32()?, tokens, out_features),
            update,
        });
    }
    let mut dx = Tensor::empty(device, [tokens, in_features], DType::F32)?;
    let tiles = MatrixMut::new(dx.as_f32_mut()?, tokens, in_features).tiles(TOKEN_BLOCK, IN_BLOCK);
    tiles.into_par_iter().try_for_each(|mut tile| {
        if terms.is_empty() {
            (0..tile.matrix.rows()).for_each(|row| tile.matrix.row_mut(row).fill(0.0));
        }
        for (index, term) in terms.iter().enumerate() {
            term.add_to(
                &mut tile,
                if index == 0 {
                    Write::Replace
                } else {
                    Write::Add
                },
                in_features,
                device,
            )?;
        }
        Ok(())
    })?;
    Ok(Some(dx))
}

/// Adds to the gradients of `A` and `B`, and returns `dH = scaling·dY·B`.
fn update_gradients(x: &Tensor, item: &mut Backward) -> Result<Option<Tensor>> {
    let Some(lora) = item.projection.lora else {
        return Ok(None);
    };
    let device = x.device();
    let (tokens, in_features) = x.matrix("x", "[tokens, in_features]")?;
    let (out_features, rank) = (item.projection.weight.out_features(), lora.rank());
    let x = Matrix::new(x.as_f32()?, tokens, in_features);
    let dy = Matrix::new(item.dy.as_f32()?, tokens, out_features);
    let b = Matrix::new(lora.b.as_f32()?, out_features, rank);
    let mut dh = Tensor::empty(device, [tokens, rank], DType::F32)?;
    let tiles = MatrixMut::new(dh.as_f32_mut()?, tokens, rank).tiles(GRADIENT_BLOCK, rank);
    tiles.into_par_iter().for_each(|mut tile| {
        let dy = dy.row_block(tile.rows());
        multiply(&mut tile.matrix, Write::Replace, lora.scaling, dy, b);
    });
    if let (Some(Gradients { a: da, b: db }), Some(h)) = (&mut item.gradients, item.h) {
        let h = Matrix::new(h.as_f32()?, tokens, rank);
        let tiles = MatrixMut::new(db.f32_mut("gradient of lora_b")?, out_features, rank)
            .tiles(GRADIENT_BLOCK, rank);
        tiles.into_par_iter().for_each(|mut tile| {
            let dy = dy.column_block(tile.rows()).transposed();
            multiply(&mut tile.matrix, Write::Add, lora.scaling, dy, h);
        });
        let dh = Matrix::new(dh.as_f32()?, tokens, rank);
        let tiles = MatrixMut::new(da.f32_mut("gradient of lora_a")?, rank, in_features)
            .tiles(rank, GRADIENT_BLOCK);
        tiles
            .into_par_iter()
            .try_for_each(|tile| add_to_da(tile, dh, x, &lora, device))?;
    }
    Ok(Some(dh))
}

/// `dA += dHᵀ·drop(x)` for the columns of one tile.
fn add_to_da(mut da: Tile, dh: Matrix, x: Matrix, lora: &Lora, device: &Device) -> Result<()> {
    let columns = da.columns();
    let Some(dropout) = lora.active_dropout() else {
        multiply(
            &mut da.matrix,
            Write::Add,
            1.0,
            dh.transposed(),
            x.column_block(columns),
        );
        return Ok(());
    };
    let mut scratch = device.scratch(x.rows() * columns.len())?;
    let dropped = scratch.f32_mut();
    for (row, target) in dropped.chunks_exact_mut(columns.len()).enumerate() {
        target.copy_from_slice(&x.row(row)[columns.clone()]);
        dropout.apply((row * x.columns() + columns.start) as u64, target);
    }
    multiply(
        &mut da.matrix,
        Write::Add,
        1.0,
        dh.transposed(),
        Matrix::new(dropped, x.rows(), columns.len()),
    );
    Ok(())
}

/// What one projection adds to `dx`.
struct Term<'a> {
    item: &'a Backward<'a>,
    dy: Matrix<'a>,
    update: Option<(Lora<'a>, Matrix<'a>, Matrix<'a>)>,
}

impl Term<'_> {
    /// `dx += dY·W + drop(dH·A)` for one tile.
    fn add_to(
        &self,
        dx: &mut Tile,
        write: Write,
        in_features: usize,
        device: &Device,
    ) -> Result<()> {
        let weight = self.item.projection.weight;
        let (tokens, columns) = (dx.rows(), dx.columns());
        let dy = self.dy.row_block(tokens.clone());
        match weight.as_f32() {
            Some(values) => {
                let w = Matrix::new(values, weight.out_features(), in_features)
                    .column_block(columns.clone());
                multiply(&mut dx.matrix, write, 1.0, dy, w);
            }
            None => self.add_decoded(dx, write, in_features, device)?,
        }
        let Some((lora, dh, a)) = &self.update else {
            return Ok(());
        };
        let (dh, a) = (
            dh.row_block(tokens.clone()),
            a.column_block(columns.clone()),
        );
        let Some(dropout) = lora.active_dropout() else {
            multiply(&mut dx.matrix, Write::Add, 1.0, dh, a);
            return Ok(());
        };
        let mut scratch = device.scratch(tokens.len() * columns.len())?;
        let update = scratch.f32_mut();
        multiply(
            &mut MatrixMut::new(update, tokens.len(), columns.len()),
            Write::Replace,
            1.0,
            dh,
            a,
        );
        for (row, update) in update.chunks_exact_mut(columns.len()).enumerate() {
            dropout.apply(
                ((tokens.start + row) * in_features + columns.start) as u64,
                update,
            );
            simd::vectorize(
                #[inline(always)]
                || simd::axpy(1.0, update, dx.matrix.row_mut(row)),
            );
        }
        Ok(())
    }

    /// `dx += dY·W` for a weight that needs decoding: block by block into scratch memory.
    fn add_decoded(
        &self,
        dx: &mut Tile,
        write: Write,
        in_features: usize,
        device: &Device,
    ) -> Result<()> {
        let weight = self.item.projection.weight;
        let (tokens, columns) = (dx.rows(), dx.columns());
        let out_features = weight.out_features();
        let mut scratch = device.scratch(out_features.min(DECODE_BLOCK) * columns.len())?;
        let scratch = scratch.f32_mut();
        if out_features == 0 && write == Write::Replace {
            (0..tokens.len()).for_each(|row| dx.matrix.row_mut(row).fill(0.0));
        }
        for first in (0..out_features).step_by(DECODE_BLOCK) {
            let rows = first..out_features.min(first + DECODE_BLOCK);
            let w = &mut scratch[..rows.len() * columns.len()];
            for (row, target) in rows.clone().zip(w.chunks_exact_mut(columns.len())) {
                weight.decode(
                    row * in_features + columns.start..row * in_features + columns.end,
                    target,
                );
            }
            let dy = self.dy.block(tokens.clone(), rows.clone());
            let write = if first == 0 { write } else { Write::Add };
            multiply(
                &mut dx.matrix,
                write,
                1.0,
                dy,
                Matrix::new(w, rows.len(), columns.len()),
            );
        }
        Ok(())
    }
}
