use super::{AttentionConfig, Sequence};
use crate::{
    Device, Result, Tensor,
    matrix::{Matrix, MatrixMut, Tile, Write, multiply},
    simd,
};
use rayon::prelude::*;
use std::ops::Range;

/// Queries and keys of one block of scores: 64 KiB, which stays in the second-level cache.
const QUERY_BLOCK: usize = 64;
const KEY_BLOCK: usize = 256;

pub(super) fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sequences: &[Sequence],
    config: &AttentionConfig,
    o: &mut Tensor,
    lse: &mut Tensor,
) -> Result<()> {
    let &AttentionConfig {
        heads,
        kv_heads,
        head_dim,
        ..
    } = config;
    let (q, k, v) = (matrix(q, "q")?, matrix(k, "k")?, matrix(v, "v")?);
    let device = o.device().clone();
    let tokens = q.rows();
    let mut o = MatrixMut::new(o.as_f32_mut()?, tokens, heads * head_dim);
    let mut lse = MatrixMut::new(lse.as_f32_mut()?, tokens, heads);
    let mut tasks = Vec::new();
    for sequence in sequences {
        let (o_rows, o_rest) = o.split_rows(sequence.queries.len());
        let (lse_rows, lse_rest) = lse.split_rows(sequence.queries.len());
        (o, lse) = (o_rest, lse_rest);
        for (o, lse) in o_rows
            .tiles(QUERY_BLOCK, head_dim)
            .into_iter()
            .zip(lse_rows.tiles(QUERY_BLOCK, 1))
        {
            let head = lse.column;
            let queries =
                sequence.queries.start + o.row..sequence.queries.start + o.row + o.matrix.rows();
            let kv_columns = columns(head / (heads / kv_heads), head_dim);
            tasks.push(ForwardTask {
                q: q.block(queries, columns(head, head_dim)),
                k: k.block(sequence.keys.clone(), kv_columns.clone()),
                v: v.block(sequence.keys.clone(), kv_columns),
                first_position: o.row + sequence.keys.len() - sequence.queries.len(),
                o,
                lse,
            });
        }
    }
    if tasks.len() == heads && tokens == 1 {
        // One token with a short cache is over before a worker wakes.
        return tasks
            .into_iter()
            .try_for_each(|task| task.run(config, &device));
    }
    tasks
        .into_par_iter()
        .try_for_each(|task| task.run(config, &device))
}

/// A block of queries of one head, against all keys that it sees.
struct ForwardTask<'a> {
    q: Matrix<'a>,
    k: Matrix<'a>,
    v: Matrix<'a>,
    /// The position of the first query among the keys.
    first_position: usize,
    o: Tile<'a>,
    lse: Tile<'a>,
}

impl ForwardTask<'_> {
    fn run(self, config: &AttentionConfig, device: &Device) -> Result<()> {
        let ForwardTask {
            q,
            k,
            v,
            first_position,
            o: Tile { matrix: mut o, .. },
            lse: Tile {
                matrix: mut lse, ..
            },
        } = self;
        let rows = q.rows();
        let visible = visible_keys(first_position, rows, config.window);
        let width = visible.len().min(KEY_BLOCK);
        let mut scratch = device.scratch(rows * width + 2 * rows)?;
        let (scores, statistics) = scratch.f32_mut().split_at_mut(rows * width);
        // Of each query: the largest score so far, and the sum of exponentials relative to it.
        let (largest, sums) = statistics.split_at_mut(rows);
        largest.fill(f32::NEG_INFINITY);
        sums.fill(0.0);
        for keys in blocks(visible.clone()) {
            let scores = &mut scores[..rows * keys.len()];
            let mut s = MatrixMut::new(scores, rows, keys.len());
            multiply(
                &mut s,
                Write::Replace,
                config.scale,
                q,
                k.row_block(keys.clone()).transposed(),
            );
            simd::vectorize(
                #[inline(always)]
                || {
                    for (row, s) in scores.chunks_exact_mut(keys.len()).enumerate() {
                        mask(s, &keys, first_position + row, config.window);
                        let max = simd::max(s).max(largest[row]);
                        if max == f32::NEG_INFINITY {
                            // Nothing is visible yet: exponentials relative to -infinity would be NaN.
                            s.fill(0.0);
                            continue;
                        }
                        let correction = simd::exp(largest[row] - max);
                        sums[row] = sums[row] * correction + simd::exp_shifted(s, max);
                        largest[row] = max;
                        if keys.start > visible.start {
                            o.row_mut(row).iter_mut().for_each(|o| *o *= correction);
                        }
                    }
                },
            );
            let write = if keys.start == visible.start {
                Write::Replace
            } else {
                Write::Add
            };
            multiply(
                &mut o,
                write,
                1.0,
                Matrix::new(scores, rows, keys.len()),
                v.row_block(keys),
            );
        }
        for row in 0..rows {
            let inverse = 1.0 / sums[row];
            o.row_mut(row).iter_mut().for_each(|o| *o *= inverse);
            lse.row_mut(row)[0] = largest[row] + sums[row].ln();
        }
        Ok(())
    }
}

/// The tensors of the forward pass, and the gradient of its output.
pub(super) struct Saved<'a> {
    pub d_o: &'a Tensor,
    pub q: &'a Tensor,
    pub k: &'a Tensor,
    pub v: &'a Tensor,
    pub o: &'a Tensor,
    pub lse: &'a Tensor,
}

pub(super) fn backward(
    saved: &Saved,
    sequences: &[Sequence],
    config: &AttentionConfig,
    dq: &mut Tensor,
    dk: &mut Tensor,
    dv: &mut Tensor,
) -> Result<()> {
    let &AttentionConfig {
        heads,
        kv_heads,
        head_dim,
        ..
    } = config;
    let group = heads / kv_heads;
    let views = Views {
        d_o: matrix(saved.d_o, "d_o")?,
        q: matrix(saved.q, "q")?,
        k: matrix(saved.k, "k")?,
        v: matrix(saved.v, "v")?,
        o: matrix(saved.o, "o")?,
        lse: matrix(saved.lse, "lse")?,
    };
    let device = dq.device().clone();
    let mut dq = MatrixMut::new(dq.as_f32_mut()?, views.q.rows(), heads * head_dim);
    let mut dk = MatrixMut::new(dk.as_f32_mut()?, views.k.rows(), kv_heads * head_dim);
    let mut dv = MatrixMut::new(dv.as_f32_mut()?, views.v.rows(), kv_heads * head_dim);
    let mut tasks = Vec::new();
    for sequence in sequences {
        let (dq_rows, dq_rest) = dq.split_rows(sequence.queries.len());
        let (dk_rows, dk_rest) = dk.split_rows(sequence.keys.len());
        let (dv_rows, dv_rest) = dv.split_rows(sequence.keys.len());
        (dq, dk, dv) = (dq_rest, dk_rest, dv_rest);
        let dq_tiles = dq_rows.tiles(sequence.queries.len(), group * head_dim);
        let dk_tiles = dk_rows.tiles(sequence.keys.len(), head_dim);
        let dv_tiles = dv_rows.tiles(sequence.keys.len(), head_dim);
        for (kv_head, ((dq, dk), dv)) in
            dq_tiles.into_iter().zip(dk_tiles).zip(dv_tiles).enumerate()
        {
            tasks.push(BackwardTask {
                sequence,
                kv_head,
                dq,
                dk: dk.matrix,
                dv: dv.matrix,
            });
        }
    }
    tasks
        .into_par_iter()
        .try_for_each(|task| task.run(&views, config, &device))
}

struct Views<'a> {
    d_o: Matrix<'a>,
    q: Matrix<'a>,
    k: Matrix<'a>,
    v: Matrix<'a>,
    o: Matrix<'a>,
    lse: Matrix<'a>,
}

/// A key head of one sequence with the query heads that read it: nobody else adds to these gradients.
struct BackwardTask<'a> {
    sequence: &'a Sequence,
    kv_head: usize,
    dq: Tile<'a>,
    dk: MatrixMut<'a>,
    dv: MatrixMut<'a>,
}

impl BackwardTask<'_> {
    fn run(self, views: &Views, config: &AttentionConfig, device: &Device) -> Result<()> {
        let BackwardTask {
            sequence,
            kv_head,
            dq,
            dk,
            dv,
        } = self;
        let &AttentionConfig {
            heads,
            kv_heads,
            head_dim,
            scale,
            window,
        } = config;
        let kv_columns = columns(kv_head, head_dim);
        let k = views.k.block(sequence.keys.clone(), kv_columns.clone());
        let v = views.v.block(sequence.keys.clone(), kv_columns);
        let offset = sequence.keys.len() - sequence.queries.len();
        let mut dk = dk.tiles(KEY_BLOCK, head_dim);
        let mut dv = dv.tiles(KEY_BLOCK, head_dim);
        let largest = QUERY_BLOCK * KEY_BLOCK.min(sequence.keys.len());
        let mut scratch = device.scratch(2 * largest)?;
        let (p_scratch, ds_scratch) = scratch.f32_mut().split_at_mut(largest);
        for mut dq in dq.matrix.tiles(QUERY_BLOCK, head_dim) {
            let head = kv_head * (heads / kv_heads) + dq.column / head_dim;
            let rows =
                sequence.queries.start + dq.row..sequence.queries.start + dq.row + dq.matrix.rows();
            let q = views.q.block(rows.clone(), columns(head, head_dim));
            let d_o = views.d_o.block(rows.clone(), columns(head, head_dim));
            let o = views.o.block(rows.clone(), columns(head, head_dim));
            let lse = views.lse.block(rows.clone(), 0..heads);
            let first_position = dq.row + offset;
            let visible = visible_keys(first_position, rows.len(), window);
            for block in visible.start / KEY_BLOCK..visible.end.div_ceil(KEY_BLOCK) {
                // Whole blocks from the first key on, so that they match the tiles of dk and dv; a window may
                // hide the beginning of the first one.
                let keys = block * KEY_BLOCK..((block + 1) * KEY_BLOCK).min(visible.end);
                let (k, v) = (k.row_block(keys.clone()), v.row_block(keys.clone()));
                let p = &mut p_scratch[..rows.len() * keys.len()];
                let ds = &mut ds_scratch[..rows.len() * keys.len()];
                multiply(
                    &mut MatrixMut::new(p, rows.len(), keys.len()),
                    Write::Replace,
                    scale,
                    q,
                    k.transposed(),
                );
                multiply(
                    &mut MatrixMut::new(ds, rows.len(), keys.len()),
                    Write::Replace,
                    1.0,
                    d_o,
                    v.transposed(),
                );
                simd::vectorize(
                    #[inline(always)]
                    || {
                        let rows = p
                            .chunks_exact_mut(keys.len())
                            .zip(ds.chunks_exact_mut(keys.len()))
                            .enumerate();
                        for (row, (p, ds)) in rows {
                            mask(p, &keys, first_position + row, window);
                            let delta = simd::dot(d_o.row(row), o.row(row));
                            let lse = lse.row(row)[head];
                            for (p, ds) in p.iter_mut().zip(ds) {
                                *p = simd::exp(*p - lse);
                                *ds = *p * (*ds - delta);
                            }
                        }
                    },
                );
                let p = Matrix::new(p, rows.len(), keys.len());
                let ds = Matrix::new(ds, rows.len(), keys.len());
                let write = if block == visible.start / KEY_BLOCK {
                    Write::Replace
                } else {
                    Write::Add
                };
                multiply(&mut dq.matrix, write, scale, ds, k);
                // The visible keys may end inside the block, the tiles go on.
                let mut dv = dv[block].matrix.rows_mut(keys.len());
                multiply(&mut dv, Write::Add, 1.0, p.transposed(), d_o);
                let mut dk = dk[block].matrix.rows_mut(keys.len());
                multiply(&mut dk, Write::Add, scale, ds.transposed(), q);
            }
        }
        Ok(())
    }
}

fn matrix<'a>(tensor: &'a Tensor, name: &str) -> Result<Matrix<'a>> {
    let (rows, columns) = tensor.matrix(name, "[tokens, width]")?;
    Ok(Matrix::new(tensor.f32(name)?, rows, columns))
}

fn columns(head: usize, head_dim: usize) -> Range<usize> {
    head * head_dim..(head + 1) * head_dim
}

/// The keys that any of `rows` queries sees, the first of which stands at `first_position`.
fn visible_keys(first_position: usize, rows: usize, window: Option<usize>) -> Range<usize> {
    let start = window.map_or(0, |window| (first_position + 1).saturating_sub(window));
    start..first_position + rows
}

fn blocks(keys: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = keys.end;
    keys.step_by(KEY_BLOCK)
        .map(move |start| start..end.min(start + KEY_BLOCK))
}

/// Sets the scores of the keys that the query at `position` does not see to -infinity.
#[inline(always)]
fn mask(scores: &mut [f32], keys: &Range<usize>, position: usize, window: Option<usize>) {
    let end = (position + 1).clamp(keys.start, keys.end);
    scores[end - keys.start..].fill(f32::NEG_INFINITY);
    if let Some(window) = window {
        let start = (position + 1)
            .saturating_sub(window)
            .clamp(keys.start, keys.end);
        scores[..start - keys.start].fill(f32::NEG_INFINITY);
    }
}
