use super::{Backward, Gradients, Lora};
use crate::{
    DType, Device, Result, Tensor,
    matrix::{
        Matrix, MatrixMut, Panels, Term, Tile, Write, multiply, multiply_panels, rows_per_task,
    },
    simd,
};
use rayon::prelude::*;

/// Columns of a tile of `dx`.
const IN_BLOCK: usize = 96;
/// Rows of a weight that are decoded at a time where it is not stored in F32.
const DECODE_BLOCK: usize = 256;
/// Tokens of a task of `dh`.
const H_BLOCK: usize = 120;
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
    let mut sources = Vec::with_capacity(items.len());
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
        sources.push(Source {
            item,
            dy: Matrix::new(item.dy.as_f32()?, tokens, out_features),
            update,
        });
    }
    let mut dx = Tensor::empty(device, [tokens, in_features], DType::F32)?;
    let token_block = rows_per_task(tokens, in_features.div_ceil(IN_BLOCK));
    let tiles = MatrixMut::new(dx.as_f32_mut()?, tokens, in_features).tiles(token_block, IN_BLOCK);
    tiles
        .into_par_iter()
        .try_for_each(|mut tile| write_tile(&mut tile, &sources, in_features, device))?;
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
    let tiles = MatrixMut::new(dh.as_f32_mut()?, tokens, rank).tiles(H_BLOCK, rank);
    tiles.into_par_iter().try_for_each(|mut tile| {
        let product = Term {
            lhs: dy.row_block(tile.rows()),
            rhs: b,
            scale: lora.scaling,
        };
        multiply(&mut tile.matrix, Write::Replace, &[product], device)
    })?;
    if let (Some(Gradients { a: da, b: db }), Some(h)) = (&mut item.gradients, item.h) {
        let h = Matrix::new(h.as_f32()?, tokens, rank);
        let tiles = MatrixMut::new(db.f32_mut("gradient of lora_b")?, out_features, rank)
            .tiles(GRADIENT_BLOCK, rank);
        tiles.into_par_iter().try_for_each(|mut tile| {
            let product = Term {
                lhs: dy.column_block(tile.rows()).transposed(),
                rhs: h,
                scale: lora.scaling,
            };
            multiply(&mut tile.matrix, Write::Add, &[product], device)
        })?;
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
        let x = x.column_block(columns);
        return match Panels::in_place(x) {
            Some(panels) => {
                multiply_panels(&mut da.matrix, Write::Add, &[(dh.transposed(), panels)]);
                Ok(())
            }
            None => multiply(
                &mut da.matrix,
                Write::Add,
                &[Term::new(dh.transposed(), x)],
                device,
            ),
        };
    };
    let mask = dropout.mask()?;
    let mut scratch = device.scratch(x.rows() * columns.len())?;
    let dropped = scratch.f32_mut();
    for (row, target) in dropped.chunks_exact_mut(columns.len()).enumerate() {
        target.copy_from_slice(&x.row(row)[columns.clone()]);
        mask.apply((row * x.columns() + columns.start) as u64, target);
    }
    let dropped = Matrix::new(dropped, x.rows(), columns.len());
    multiply(
        &mut da.matrix,
        Write::Add,
        &[Term::new(dh.transposed(), dropped)],
        device,
    )
}

/// What one projection adds to `dx`.
struct Source<'a> {
    item: &'a Backward<'a>,
    dy: Matrix<'a>,
    update: Option<(Lora<'a>, Matrix<'a>, Matrix<'a>)>,
}

/// `dx = Σ dY·W + drop(dH·A)` for one tile: whatever can be read where it is in one sum of products, then
/// what needs scratch memory.
fn write_tile(
    dx: &mut Tile,
    sources: &[Source],
    in_features: usize,
    device: &Device,
) -> Result<()> {
    let (tokens, columns) = (dx.rows(), dx.columns());
    let mut terms = Vec::with_capacity(2 * sources.len());
    for Source { item, dy, update } in sources {
        let weight = item.projection.weight;
        if let Some(values) = weight.as_f32() {
            let w = Matrix::new(values, weight.out_features(), in_features);
            terms.push(Term::new(
                dy.row_block(tokens.clone()),
                w.column_block(columns.clone()),
            ));
        }
        if let Some((lora, dh, a)) = update
            && lora.active_dropout().is_none()
        {
            terms.push(Term::new(
                dh.row_block(tokens.clone()),
                a.column_block(columns.clone()),
            ));
        }
    }
    multiply(&mut dx.matrix, Write::Replace, &terms, device)?;
    for source in sources {
        if source.item.projection.weight.as_f32().is_none() {
            source.add_decoded(dx, device)?;
        }
        source.add_dropped_update(dx, in_features, device)?;
    }
    Ok(())
}

impl Source<'_> {
    /// `dx += drop(dH·A)` for one tile, where the update has a dropout.
    fn add_dropped_update(&self, dx: &mut Tile, in_features: usize, device: &Device) -> Result<()> {
        let Some((lora, dh, a)) = &self.update else {
            return Ok(());
        };
        let Some(dropout) = lora.active_dropout() else {
            return Ok(());
        };
        let mask = dropout.mask()?;
        let (tokens, columns) = (dx.rows(), dx.columns());
        let mut scratch = device.scratch(tokens.len() * columns.len())?;
        let update = scratch.f32_mut();
        let product = Term::new(
            dh.row_block(tokens.clone()),
            a.column_block(columns.clone()),
        );
        multiply(
            &mut MatrixMut::new(update, tokens.len(), columns.len()),
            Write::Replace,
            &[product],
            device,
        )?;
        for (row, update) in update.chunks_exact_mut(columns.len()).enumerate() {
            mask.apply(
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
    fn add_decoded(&self, dx: &mut Tile, device: &Device) -> Result<()> {
        let weight = self.item.projection.weight;
        let (out_features, in_features) = (weight.out_features(), weight.in_features());
        let (tokens, columns) = (dx.rows(), dx.columns());
        let dy = self.dy.row_block(tokens);
        let mut scratch = device.scratch(out_features.min(DECODE_BLOCK) * columns.len())?;
        let scratch = scratch.f32_mut();
        for first in (0..out_features).step_by(DECODE_BLOCK) {
            let rows = first..out_features.min(first + DECODE_BLOCK);
            let w = &mut scratch[..rows.len() * columns.len()];
            for (row, target) in rows.clone().zip(w.chunks_exact_mut(columns.len())) {
                let start = row * in_features;
                weight.decode(start + columns.start..start + columns.end, target);
            }
            let w = Matrix::new(w, rows.len(), columns.len());
            multiply(
                &mut dx.matrix,
                Write::Add,
                &[Term::new(dy.column_block(rows), w)],
                device,
            )?;
        }
        Ok(())
    }
}
