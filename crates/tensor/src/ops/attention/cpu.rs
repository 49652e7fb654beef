use super::{AttentionConfig, Sequence};
use crate::{
    Device, Result, Tensor,
    matrix::{Matrix, MatrixMut, PANEL, Panels, Tile, Write, multiply_panels},
    simd,
};
use rayon::prelude::*;
use std::ops::Range;

/// Queries of a block of scores. Small, because half of the last block of keys that it sees is masked.
const QUERY_BLOCK: usize = 48;
/// Keys of a block of scores: 48 KiB, which stays in the second-level cache.
const KEY_BLOCK: usize = 8 * PANEL;

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
    let mut scratch = device.scratch(packed_len(sequences, config))?;
    let heads_of_keys = key_heads(k, v, sequences, config, scratch.f32_mut());
    let mut o = MatrixMut::new(o.as_f32_mut()?, tokens, heads * head_dim);
    let mut lse = MatrixMut::new(lse.as_f32_mut()?, tokens, heads);
    let mut tasks = Vec::new();
    for (index, sequence) in sequences.iter().enumerate() {
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
            tasks.push(ForwardTask {
                q: q.block(queries, columns(head, head_dim)),
                keys: &heads_of_keys[index * kv_heads + head / (heads / kv_heads)],
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

/// A sequence with no more queries than this reads its keys too few times to pack them first.
const FEW_QUERIES: usize = 4;

/// The keys and values of one head of one sequence.
struct KeyHead<'a> {
    k: Matrix<'a>,
    v: Matrix<'a>,
    scale: f32,
    /// `scale · kᵀ` and `v`, where there are enough queries.
    panels: Option<(Panels<'a>, Panels<'a>)>,
}

/// Elements of one head's packed keys and values.
fn packed_lens(sequence: &Sequence, head_dim: usize) -> (usize, usize) {
    if sequence.queries.len() <= FEW_QUERIES {
        return (0, 0);
    }
    let keys = sequence.keys.len();
    (Panels::len(head_dim, keys), Panels::len(keys, head_dim))
}

fn packed_len(sequences: &[Sequence], config: &AttentionConfig) -> usize {
    let lens = sequences
        .iter()
        .map(|sequence| packed_lens(sequence, config.head_dim));
    config.kv_heads * lens.map(|(k, v)| k + v).sum::<usize>()
}

/// The key heads of every sequence, sequence by sequence, packed into `buffer`.
fn key_heads<'a>(
    k: Matrix<'a>,
    v: Matrix<'a>,
    sequences: &[Sequence],
    config: &AttentionConfig,
    mut buffer: &'a mut [f32],
) -> Vec<KeyHead<'a>> {
    let mut heads = Vec::with_capacity(sequences.len() * config.kv_heads);
    for sequence in sequences {
        let (k_len, v_len) = packed_lens(sequence, config.head_dim);
        for head in 0..config.kv_heads {
            let (k_buffer, rest) = buffer.split_at_mut(k_len);
            let (v_buffer, rest) = rest.split_at_mut(v_len);
            buffer = rest;
            let columns = columns(head, config.head_dim);
            let k = k.block(sequence.keys.clone(), columns.clone());
            let v = v.block(sequence.keys.clone(), columns);
            heads.push((k, v, k_buffer, v_buffer));
        }
    }
    let pack =
        |(k, v, k_buffer, v_buffer): (Matrix<'a>, Matrix<'a>, &'a mut [f32], &'a mut [f32])| {
            let panels = (!v_buffer.is_empty()).then(|| {
                (
                    Panels::pack(k.transposed(), config.scale, k_buffer),
                    Panels::pack(v, 1.0, v_buffer),
                )
            });
            KeyHead {
                k,
                v,
                scale: config.scale,
                panels,
            }
        };
    if buffer.is_empty() && heads.iter().all(|(_, _, _, v_buffer)| v_buffer.is_empty()) {
        return heads.into_iter().map(pack).collect();
    }
    heads.into_par_iter().map(pack).collect()
}

impl KeyHead<'_> {
    /// `scores = scale · q·kᵀ` for the given keys.
    fn scores(&self, q: Matrix, keys: &Range<usize>, scores: &mut MatrixMut) {
        if let Some((k, _)) = self.panels {
            multiply_panels(scores, Write::Replace, &[(q, k.column_block(keys.clone()))]);
            return;
        }
        simd::vectorize(
            #[inline(always)]
            || {
                for row in 0..q.rows() {
                    for (score, key) in scores.row_mut(row).iter_mut().zip(keys.clone()) {
                        *score = self.scale * simd::dot(q.row(row), self.k.row(key));
                    }
                }
            },
        );
    }

    /// `o = p·v` for the given keys, or `o += …`.
    fn add_values(&self, p: Matrix, keys: &Range<usize>, o: &mut MatrixMut, write: Write) {
        if let Some((_, v)) = self.panels {
            multiply_panels(o, write, &[(p, v.row_block(keys.clone()))]);
            return;
        }
        simd::vectorize(
            #[inline(always)]
            || {
                for row in 0..p.rows() {
                    let o = o.row_mut(row);
                    if write == Write::Replace {
                        o.fill(0.0);
                    }
                    for (&p, key) in p.row(row).iter().zip(keys.clone()) {
                        simd::axpy(p, self.v.row(key), o);
                    }
                }
            },
        );
    }
}

/// A block of queries of one head, against all keys that it sees.
struct ForwardTask<'a> {
    q: Matrix<'a>,
    keys: &'a KeyHead<'a>,
    /// The position of the first query among the keys.
    first_position: usize,
    o: Tile<'a>,
    lse: Tile<'a>,
}

impl ForwardTask<'_> {
    fn run(self, config: &AttentionConfig, device: &Device) -> Result<()> {
        let ForwardTask {
            q,
            keys: head,
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
            head.scores(q, &keys, &mut MatrixMut::new(scores, rows, keys.len()));
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
            head.add_values(Matrix::new(scores, rows, keys.len()), &keys, &mut o, write);
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
        let keys = sequence.keys.len();
        let scores = QUERY_BLOCK * KEY_BLOCK.min(keys);
        let lens = [
            scores,
            scores,
            Panels::len(QUERY_BLOCK, head_dim),
            Panels::len(QUERY_BLOCK, head_dim),
            Panels::len(head_dim, keys),
            Panels::len(head_dim, keys),
            Panels::len(keys, head_dim),
        ];
        let mut scratch = device.scratch(lens.iter().sum())?;
        let mut rest = scratch.f32_mut();
        let [
            p_scratch,
            ds_scratch,
            q_panels,
            d_o_panels,
            k_columns,
            v_columns,
            k_rows,
        ] = lens.map(|len| {
            let (part, others) = std::mem::take(&mut rest).split_at_mut(len);
            rest = others;
            part
        });
        let k_columns = Panels::pack(k.transposed(), scale, k_columns);
        let v_columns = Panels::pack(v.transposed(), 1.0, v_columns);
        let k_rows = Panels::pack(k, scale, k_rows);
        for mut dq in dq.matrix.tiles(QUERY_BLOCK, head_dim) {
            let head = kv_head * (heads / kv_heads) + dq.column / head_dim;
            let rows =
                sequence.queries.start + dq.row..sequence.queries.start + dq.row + dq.matrix.rows();
            let q = views.q.block(rows.clone(), columns(head, head_dim));
            let d_o = views.d_o.block(rows.clone(), columns(head, head_dim));
            let o = views.o.block(rows.clone(), columns(head, head_dim));
            let lse = views.lse.block(rows.clone(), 0..heads);
            let len = Panels::len(rows.len(), head_dim);
            let q_panels = Panels::pack(q, scale, &mut q_panels[..len]);
            let d_o_panels = Panels::pack(d_o, 1.0, &mut d_o_panels[..len]);
            let first_position = dq.row + offset;
            let visible = visible_keys(first_position, rows.len(), window);
            for block in visible.start / KEY_BLOCK..visible.end.div_ceil(KEY_BLOCK) {
                // Whole blocks from the first key on, so that they match the tiles of dk and dv; a window may
                // hide the beginning of the first one.
                let keys = block * KEY_BLOCK..((block + 1) * KEY_BLOCK).min(visible.end);
                let p = &mut p_scratch[..rows.len() * keys.len()];
                let ds = &mut ds_scratch[..rows.len() * keys.len()];
                multiply_panels(
                    &mut MatrixMut::new(p, rows.len(), keys.len()),
                    Write::Replace,
                    &[(q, k_columns.column_block(keys.clone()))],
                );
                multiply_panels(
                    &mut MatrixMut::new(ds, rows.len(), keys.len()),
                    Write::Replace,
                    &[(d_o, v_columns.column_block(keys.clone()))],
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
                let k = k_rows.row_block(keys.clone());
                multiply_panels(&mut dq.matrix, write, &[(ds, k)]);
                // The visible keys may end inside the block, the tiles go on.
                let mut dv = dv[block].matrix.rows_mut(keys.len());
                multiply_panels(&mut dv, Write::Add, &[(p.transposed(), d_o_panels)]);
                let mut dk = dk[block].matrix.rows_mut(keys.len());
                multiply_panels(&mut dk, Write::Add, &[(ds.transposed(), q_panels)]);
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

/// The keys that any of `rows` queries sees, the first of which stands at `first_position`; from where a
/// panel of keys begins.
fn visible_keys(first_position: usize, rows: usize, window: Option<usize>) -> Range<usize> {
    let start = window.map_or(0, |window| (first_position + 1).saturating_sub(window));
    start / PANEL * PANEL..first_position + rows
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
