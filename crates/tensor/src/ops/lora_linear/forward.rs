use super::{Lora, Output, Projection};
use crate::{
    DType, Device, Result, Tensor, Weight,
    matrix::{Matrix, MatrixMut, Term, Tile, Write, multiply, rows_per_task},
    simd,
};
use rayon::prelude::*;

/// Tokens whose `x` stays in the second-level cache while every `h` is computed from it.
const H_BLOCK: usize = 120;
/// Columns of a tile of `y`.
const OUT_BLOCK: usize = 96;
/// Up to this many tokens, a product reads each weight so few times that packing it would dominate.
const FEW_TOKENS: usize = 4;
/// Output features of a task when there are few tokens.
const FEW_TOKENS_OUT_BLOCK: usize = 64;

pub(super) fn run(x: &Tensor, projections: &[Projection], outputs: &mut [Output]) -> Result<()> {
    let (tokens, in_features) = x.matrix("x", "[tokens, in_features]")?;
    let device = x.device();
    let x = Matrix::new(x.f32("x")?, tokens, in_features);
    let (mut ys, mut hs) = (Vec::new(), Vec::new());
    for Output { y, h } in outputs {
        ys.push(y);
        hs.push(h.as_mut());
    }
    down(x, projections, &mut hs, device)?;

    let few = tokens <= FEW_TOKENS;
    let out_block = if few { FEW_TOKENS_OUT_BLOCK } else { OUT_BLOCK };
    let tiles = projections
        .iter()
        .map(|projection| projection.weight.out_features().div_ceil(out_block))
        .sum();
    let token_block = rows_per_task(tokens, tiles);
    let mut tasks = Vec::new();
    for ((projection, y), h) in projections.iter().zip(ys).zip(&hs) {
        let out_features = projection.weight.out_features();
        let update = match (&projection.lora, h) {
            (Some(lora), Some(h)) => Some(Update {
                h: Matrix::new(h.as_f32()?, tokens, lora.rank()),
                b: Matrix::new(lora.b.as_f32()?, out_features, lora.rank()),
                scaling: lora.scaling,
            }),
            _ => None,
        };
        let bias = projection.bias.map(Tensor::as_f32).transpose()?;
        for y in MatrixMut::new(y.as_f32_mut()?, tokens, out_features).tiles(token_block, out_block)
        {
            tasks.push(Task {
                weight: projection.weight,
                bias,
                update,
                y,
            });
        }
    }
    tasks.into_par_iter().try_for_each(|task| {
        if few {
            task.run_rows(x, device)
        } else {
            task.run(x, device)
        }
    })
}

/// `h = drop(x)·Aᵀ` of every projection with an update.
fn down(
    x: Matrix,
    projections: &[Projection],
    hs: &mut [Option<&mut Tensor>],
    device: &Device,
) -> Result<()> {
    let mut blocks: Vec<Vec<(Lora, Tile)>> = Vec::new();
    blocks.resize_with(x.rows().div_ceil(H_BLOCK), Vec::new);
    for (projection, h) in projections.iter().zip(hs) {
        if let (Some(lora), Some(h)) = (projection.lora, h) {
            let rank = lora.rank();
            for (block, h) in MatrixMut::new(h.as_f32_mut()?, x.rows(), rank)
                .tiles(H_BLOCK, rank)
                .into_iter()
                .enumerate()
            {
                blocks[block].push((lora, h));
            }
        }
    }
    blocks.into_par_iter().try_for_each(|block| {
        for (lora, mut h) in block {
            let a = Matrix::new(lora.a.as_f32()?, lora.rank(), x.columns()).transposed();
            match lora.active_dropout() {
                None => {
                    let x = x.row_block(h.rows());
                    multiply(&mut h.matrix, Write::Replace, &[Term::new(x, a)], device)?;
                }
                Some(dropout) => {
                    let rows = h.rows();
                    let mut scratch = device.scratch(rows.len() * x.columns())?;
                    let dropped = scratch.f32_mut();
                    for (row, target) in rows
                        .clone()
                        .zip(dropped.chunks_exact_mut(x.columns().max(1)))
                    {
                        target.copy_from_slice(x.row(row));
                    }
                    dropout
                        .mask()?
                        .apply((rows.start * x.columns()) as u64, dropped);
                    let dropped = Matrix::new(dropped, rows.len(), x.columns());
                    multiply(
                        &mut h.matrix,
                        Write::Replace,
                        &[Term::new(dropped, a)],
                        device,
                    )?;
                }
            }
        }
        Ok(())
    })
}

/// The low-rank update of one projection.
#[derive(Clone, Copy)]
struct Update<'a> {
    h: Matrix<'a>,
    b: Matrix<'a>,
    scaling: f32,
}

/// One tile of one projection's output.
struct Task<'a> {
    weight: &'a Weight,
    bias: Option<&'a [f32]>,
    update: Option<Update<'a>>,
    y: Tile<'a>,
}

impl Task<'_> {
    fn run(self, x: Matrix, device: &Device) -> Result<()> {
        let (tokens, features) = (self.y.rows(), self.y.columns());
        let Task {
            weight,
            bias,
            update,
            y: Tile { matrix: mut y, .. },
        } = self;
        let x = x.row_block(tokens.clone());
        let mut scratch;
        let w = match weight.as_f32() {
            Some(values) => {
                Matrix::new(values, weight.out_features(), x.columns()).row_block(features.clone())
            }
            None => {
                scratch = device.scratch(features.len() * x.columns())?;
                weight.decode(
                    features.start * x.columns()..features.end * x.columns(),
                    scratch.f32_mut(),
                );
                Matrix::new(scratch.f32_mut(), features.len(), x.columns())
            }
        };
        let product = Term::new(x, w.transposed());
        match update {
            Some(Update { h, b, scaling }) => {
                let update = Term {
                    lhs: h.row_block(tokens.clone()),
                    rhs: b.row_block(features.clone()).transposed(),
                    scale: scaling,
                };
                multiply(&mut y, Write::Replace, &[product, update], device)?;
            }
            None => multiply(&mut y, Write::Replace, &[product], device)?,
        }
        if let Some(bias) = bias {
            simd::vectorize(
                #[inline(always)]
                || {
                    for row in 0..tokens.len() {
                        simd::axpy(1.0, &bias[features.clone()], y.row_mut(row));
                    }
                },
            );
        }
        Ok(())
    }

    /// For few tokens: each row of the weight is decoded once and multiplied with every token.
    fn run_rows(mut self, x: Matrix, device: &Device) -> Result<()> {
        let (tokens, features) = (self.y.rows(), self.y.columns());
        let values = self.weight.as_f32();
        let mut scratch = device.scratch(if values.is_some() { 0 } else { x.columns() })?;
        let scratch = scratch.f32_mut();
        for (column, feature) in features.enumerate() {
            let range = feature * x.columns()..(feature + 1) * x.columns();
            let w = match values {
                Some(values) => &values[range],
                None => {
                    self.weight.decode(range, scratch);
                    &*scratch
                }
            };
            simd::vectorize(
                #[inline(always)]
                || {
                    for token in tokens.clone() {
                        let mut sum = simd::dot(x.row(token), w);
                        if let Some(Update { h, b, scaling }) = self.update {
                            sum += scaling * simd::dot(h.row(token), b.row(feature));
                        }
                        if let Some(bias) = self.bias {
                            sum += bias[feature];
                        }
                        self.y.matrix.row_mut(token - tokens.start)[column] = sum;
                    }
                },
            );
        }
        Ok(())
    }
}

pub(super) fn merge(weight: &Weight, lora: &Lora) -> Result<Tensor> {
    let (out_features, in_features) = weight.matrix("weight")?;
    let mut merged = Tensor::empty(lora.a.device(), [out_features, in_features], DType::F32)?;
    weight.decode(0..out_features * in_features, merged.as_f32_mut()?);
    let a = Matrix::new(lora.a.as_f32()?, lora.rank(), in_features);
    let b = Matrix::new(lora.b.as_f32()?, out_features, lora.rank());
    let tiles = MatrixMut::new(merged.as_f32_mut()?, out_features, in_features)
        .tiles(OUT_BLOCK, in_features);
    let device = lora.a.device();
    tiles.into_par_iter().try_for_each(|mut tile| {
        let update = Term {
            lhs: b.row_block(tile.rows()),
            rhs: a,
            scale: lora.scaling,
        };
        multiply(&mut tile.matrix, Write::Add, &[update], device)
    })?;
    Ok(merged)
}
