//! Causal attention with grouped-query heads over concatenated sequences, forward and backward, without a
//! matrix of scores in memory (FlashAttention 2, Dao 2023).

mod backward;
mod forward;

pub use backward::{Gradients, Saved, backward};
pub use forward::forward;

use crate::abi::AttentionShape;
use crate::modules::Kernel;
use crate::{Element, Kernels, LaunchError, Operand};
use cudarc::driver::CudaFunction;
use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MAX_DYNAMIC_SHARED;

/// Where each sequence begins in a concatenation of sequences.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// The boundaries `[sequences + 1]` u32, ascending from 0. The kernels trust them.
    pub cu_seqlens: Operand<'a>,
    /// The tokens of all sequences: the last boundary.
    pub total: u32,
    /// The tokens of the longest sequence.
    pub max_len: u32,
}

/// The heads of an attention layer, and the sequences of a batch.
///
/// The masks are aligned at the last token: with `n` keys more than queries (a cache), query `i` of a
/// sequence stands at position `i + n` and sees the keys up to there. No sequence may have fewer keys than
/// queries.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// Query heads.
    pub heads: u32,
    /// Key and value heads, a divisor of `heads`: query head `h` reads `h / (heads / kv_heads)`.
    pub kv_heads: u32,
    /// Elements of a head, from 1 to 256.
    pub head_dim: u32,
    /// Multiplies the scores, usually `1/√head_dim`; greater than 0.
    pub scale: f32,
    /// With a sliding window of `w`, query `i` sees the keys `i - w < j <= i`.
    pub window: Option<u32>,
    /// The sequences of the queries.
    pub q_rows: Rows<'a>,
    /// The sequences of the keys and values, as many.
    pub kv_rows: Rows<'a>,
}

/// Rows of a decoding step: a sequence's queries times the heads that share keys. With more of them than this
/// there is work enough without splitting the keys.
const SPLIT_ROWS: u64 = 64;
/// Blocks that keep any GPU busy.
const SPLIT_BLOCKS: u64 = 256;
/// Keys that are worth a block of their own.
const SPLIT_KEYS: u64 = 256;
/// Rows and positions are 32-bit numbers in the kernels, with room for sums of two.
const MAX_ROWS: u64 = 1 << 30;

impl Attention<'_> {
    /// The f32 elements that [`forward`] needs for partial results: none, except where few queries see
    /// many keys, as in decoding, so that several blocks share the keys of one query.
    pub fn partial_len(&self) -> u64 {
        match self.splits() {
            1 => 0,
            splits => splits * self.query_heads() * (u64::from(self.head_dim) + 1),
        }
    }

    /// The f32 elements that [`backward`] needs for statistics of the rows.
    pub fn statistics_len(&self) -> u64 {
        2 * self.query_heads()
    }

    fn query_heads(&self) -> u64 {
        u64::from(self.q_rows.total) * u64::from(self.heads)
    }

    fn group(&self) -> u64 {
        u64::from(self.heads / self.kv_heads.max(1))
    }

    fn sequences(&self) -> u64 {
        self.q_rows.cu_seqlens.len().saturating_sub(1)
    }

    /// The rows (see `sequence.cuh`) of the longest sequence.
    fn max_rows(&self) -> u64 {
        u64::from(self.q_rows.max_len) * self.group()
    }

    fn splits(&self) -> u64 {
        let blocks = u64::from(self.kv_heads) * self.sequences();
        if self.max_rows() > SPLIT_ROWS || blocks == 0 {
            return 1;
        }
        let keys = self.window.unwrap_or(u32::MAX).min(self.kv_rows.max_len);
        let worthwhile = u64::from(keys) / SPLIT_KEYS;
        SPLIT_BLOCKS.div_ceil(blocks).min(worthwhile).max(1)
    }

    /// Checks everything but the tensors.
    fn check(&self) -> Result<(), LaunchError> {
        let refuse = |parameter, found: u64, expected| {
            Err(LaunchError::Parameter {
                parameter,
                found,
                expected,
            })
        };
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            return refuse(
                "heads",
                self.heads.into(),
                "it must be a multiple of kv_heads, which must not be 0",
            );
        }
        if !(1..=256).contains(&self.head_dim) {
            return refuse("head_dim", self.head_dim.into(), "it must be from 1 to 256");
        }
        if self.scale.is_nan() || self.scale <= 0.0 {
            return refuse("scale", 0, "it must be greater than 0");
        }
        if self.window == Some(0) {
            return refuse("window", 0, "it must be at least 1");
        }
        if u64::from(self.kv_rows.max_len) * self.group() > MAX_ROWS {
            return refuse(
                "kv_rows.max_len",
                self.kv_rows.max_len.into(),
                "times the heads that share a key head, it must be at most 2^30",
            );
        }
        if self.q_rows.max_len > self.kv_rows.max_len {
            return refuse(
                "q_rows.max_len",
                self.q_rows.max_len.into(),
                "no sequence may have fewer keys than queries",
            );
        }
        let boundaries = self.q_rows.cu_seqlens.len().max(1);
        self.q_rows
            .cu_seqlens
            .check("q_rows.cu_seqlens", Element::U32, boundaries)?;
        self.kv_rows
            .cu_seqlens
            .check("kv_rows.cu_seqlens", Element::U32, boundaries)
    }

    /// Elements of a token in q, o and their gradients.
    fn q_width(&self) -> u64 {
        u64::from(self.heads) * u64::from(self.head_dim)
    }

    /// Elements of a token in k, v and their gradients.
    fn kv_width(&self) -> u64 {
        u64::from(self.kv_heads) * u64::from(self.head_dim)
    }

    /// Checks the tensors of tokens: those of queries, then those of keys.
    fn check_tensors<const Q: usize, const KV: usize>(
        &self,
        element: Element,
        queries: [(&'static str, &Operand); Q],
        keys: [(&'static str, &Operand); KV],
    ) -> Result<(), LaunchError> {
        let width = self.kv_width();
        // They may hold more tokens than the sequences have.
        let kv_tokens = (keys[0].1.len() / width).max(self.kv_rows.total.into());
        let queries = queries.map(|tensor| (tensor, u64::from(self.q_rows.total) * self.q_width()));
        let keys = keys.map(|tensor| (tensor, kv_tokens * width));
        queries
            .iter()
            .chain(&keys)
            .try_for_each(|((name, tensor), len)| tensor.check(name, element, *len))
    }

    /// The kernels' view of the call. `tensors` are all that hold heads.
    fn shape(&self, tensors: &[&Operand]) -> AttentionShape {
        let head = |tensor: &Operand| u64::from(self.head_dim) * tensor.element().size_in_bytes();
        let aligned = tensors
            .iter()
            .all(|tensor| tensor.is_aligned(16) && head(tensor).is_multiple_of(16));
        AttentionShape {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            tokens: self.q_rows.total,
            // One longer than every sequence hides nothing.
            window: self
                .window
                .unwrap_or(u32::MAX)
                .min(self.kv_rows.max_len.max(1)),
            scale: self.scale,
            splits: self.splits() as u32,
            aligned: aligned.into(),
        }
    }
}

/// The head_dim that a kernel is compiled for.
const PADDED: [u32; 3] = [64, 128, 256];

/// How the kernels for one element type and one padded head_dim cut their work.
#[derive(Debug, Clone, Copy)]
struct Tiling {
    /// Index into [`PADDED`].
    index: usize,
    padded: u32,
    element: Element,
}

/// The tile that a block owns.
#[derive(Debug, Clone, Copy)]
struct Tile {
    rows: u32,
    /// Blocks that share one.
    blocks: u32,
    shared_bytes: u32,
}

impl Tiling {
    fn of(attention: &Attention, element: Element) -> Tiling {
        let index = PADDED
            .iter()
            .position(|&padded| attention.head_dim <= padded)
            .unwrap_or(PADDED.len() - 1);
        Tiling {
            index,
            padded: PADDED[index],
            element,
        }
    }

    /// Of the forward kernels: queries, keys, values.
    fn forward(&self) -> Tile {
        match self.element {
            Element::F32 => self.simt(3),
            // `Block` of forward_16bit.cu
            _ => {
                let (rows, keys) = [(128, 64), (128, 64), (64, 32)][self.index];
                self.fragments(rows, &[rows, keys, keys])
            }
        }
    }

    /// Of the backward kernels that own rows.
    fn backward_q(&self) -> Tile {
        match self.element {
            Element::F32 => self.simt(4),
            // `RowBlock` of backward_16bit.cu
            _ => {
                let (rows, keys) = [(128, 32), (128, 32), (64, 32)][self.index];
                self.fragments(rows, &[rows, rows, keys, keys, keys, keys])
            }
        }
    }

    /// Of the backward kernels that own keys: they stream statistics too.
    fn backward_kv(&self) -> Tile {
        match self.element {
            Element::F32 => {
                let tile = self.simt(4);
                Tile {
                    shared_bytes: tile.shared_bytes + 8 * tile.rows,
                    ..tile
                }
            }
            // `KeyBlock` of backward_16bit.cu
            _ => {
                let (keys, rows) = (64, [32, 32, 16][self.index]);
                let tile = self.fragments(keys, &[keys, keys, rows, rows, rows, rows]);
                Tile {
                    blocks: self.padded.div_ceil(128),
                    shared_bytes: tile.shared_bytes + 2 * 8 * rows,
                    ..tile
                }
            }
        }
    }

    /// Of the f32 kernels, with this many tiles in shared memory (see `simt.cuh`).
    fn simt(&self, tiles: u32) -> Tile {
        let edge = if self.padded > 128 { 16 } else { 32 };
        Tile {
            rows: edge,
            blocks: 1,
            shared_bytes: 4 * edge * (tiles * (self.padded + 4) + (edge | 16)),
        }
    }

    /// Of the 16-bit kernels, with tiles of these rows in shared memory (see `fragments.cuh`).
    fn fragments(&self, rows: u32, tiles: &[u32]) -> Tile {
        Tile {
            rows,
            blocks: 1,
            shared_bytes: 2 * self.padded * tiles.iter().sum::<u32>(),
        }
    }
}

/// The function of a kernel whose blocks need this much dynamic shared memory.
fn function(
    kernels: &Kernels,
    kernel: &'static Kernel,
    shared_bytes: u32,
) -> Result<CudaFunction, LaunchError> {
    let function = kernels.function(kernel)?;
    function.set_attribute(MAX_DYNAMIC_SHARED, shared_bytes as i32)?;
    Ok(function)
}
