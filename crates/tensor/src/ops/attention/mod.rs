//! Causal attention with grouped-query heads over concatenated sequences, computed in blocks as
//! FlashAttention does (Dao, 2023): the matrix of scores never exists.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use crate::{DType, Device, Error, Result, Tensor, check};
use std::ops::Range;

/// Where each sequence begins in a concatenation of sequences.
#[derive(Debug)]
pub struct Rows {
    cu_seqlens: Vec<u32>,
    device_cu_seqlens: Tensor,
}

impl Rows {
    /// The boundaries of sequences of these lengths, back to back.
    ///
    /// # Errors
    /// When the lengths sum to 2^32 or more.
    pub fn new(device: &Device, lengths: &[usize]) -> Result<Rows> {
        let cu_seqlens = Rows::boundaries(lengths)?;
        let device_cu_seqlens = Tensor::from_u32(device, [cu_seqlens.len()], &cu_seqlens)?;
        Ok(Rows {
            cu_seqlens,
            device_cu_seqlens,
        })
    }

    /// Other boundaries in the same memory, for as many sequences, with as many tokens in all and in the longest.
    ///
    /// # Errors
    /// When one of these differs.
    pub fn refill(&mut self, lengths: &[usize]) -> Result<()> {
        let extents = |count: usize, total: usize, longest: usize| {
            format!("{count} sequences of {total} tokens, the longest of {longest}")
        };
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let found = extents(lengths.len(), lengths.iter().sum(), longest);
        let expected = extents(self.count(), self.total(), self.max_len());
        if found != expected {
            return Err(Error::Argument(format!(
                "rows: {found} cannot replace {expected}"
            )));
        }
        self.cu_seqlens = Rows::boundaries(lengths)?;
        self.device_cu_seqlens.set_u32(&self.cu_seqlens)
    }

    fn boundaries(lengths: &[usize]) -> Result<Vec<u32>> {
        let mut cu_seqlens = Vec::with_capacity(lengths.len() + 1);
        let mut end = 0u32;
        cu_seqlens.push(end);
        for &length in lengths {
            end = u32::try_from(length)
                .ok()
                .and_then(|length| end.checked_add(length))
                .ok_or_else(|| Error::Argument("rows: the lengths sum to 2^32 or more".into()))?;
            cu_seqlens.push(end);
        }
        Ok(cu_seqlens)
    }

    /// The number of sequences.
    pub fn count(&self) -> usize {
        self.cu_seqlens.len() - 1
    }

    /// The number of tokens of all sequences.
    pub fn total(&self) -> usize {
        self.cu_seqlens.last().map_or(0, |&end| end as usize)
    }

    /// The length of the longest sequence.
    pub fn max_len(&self) -> usize {
        self.iter().map(|range| range.len()).max().unwrap_or(0)
    }

    /// The tokens of each sequence.
    pub fn iter(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.cu_seqlens
            .windows(2)
            .map(|pair| pair[0] as usize..pair[1] as usize)
    }

    /// The boundaries on the device, `[count + 1]` U32, from 0.
    pub fn cu_seqlens(&self) -> &Tensor {
        &self.device_cu_seqlens
    }
}

/// The heads of an attention layer.
#[derive(Debug, Clone, Copy)]
pub struct AttentionConfig {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, a divisor of `heads`: query head `h` reads `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Multiplies the scores, usually `1/√head_dim`.
    pub scale: f32,
    /// With a sliding window of `w`, query `i` sees the keys `i - w < j <= i`.
    pub window: Option<usize>,
}

/// `o = softmax(scale · q·kᵀ)·v` for each sequence and head, of a float type.
///
/// `q [tokens, heads·head_dim]` has the boundaries `q_rows`; `k` and `v [kv_tokens, kv_heads·head_dim]` have
/// `kv_rows` and may hold more tokens than it counts. The masks are aligned at the last token: with `n` keys
/// more than queries (a cache), query `i` stands at position `i + n`.
///
/// Returns `o [tokens, heads·head_dim]` and `lse [tokens, heads]` F32, the logarithm of each softmax's denominator.
///
/// # Errors
/// When a sequence has fewer keys than queries, and on shapes and data types that do not fit.
pub fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    q_rows: &Rows,
    kv_rows: &Rows,
    config: &AttentionConfig,
) -> Result<(Tensor, Tensor)> {
    let sequences = config.check(q, k, v, q_rows, kv_rows)?;
    let mut o = Tensor::empty(q.device(), q.shape(), q.dtype())?;
    let mut lse = Tensor::empty(q.device(), [q_rows.total(), config.heads], DType::F32)?;
    #[cfg(feature = "cuda")]
    if !q.device().is_cpu() {
        cuda::forward(q, k, v, q_rows, kv_rows, config, &mut o, &mut lse)?;
        return Ok((o, lse));
    }
    cpu::forward(q, k, v, &sequences, config, &mut o, &mut lse)?;
    Ok((o, lse))
}

/// The gradients `(dq, dk, dv)` of [`forward`] for the gradient `d_o` of its output. The probabilities are
/// computed again from `lse`. Keys beyond `kv_rows` get zero.
///
/// # Errors
/// As [`forward`].
#[expect(
    clippy::too_many_arguments,
    reason = "the tensors of the forward pass and the gradient of its output"
)]
pub fn backward(
    d_o: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    q_rows: &Rows,
    kv_rows: &Rows,
    config: &AttentionConfig,
) -> Result<(Tensor, Tensor, Tensor)> {
    let sequences = config.check(q, k, v, q_rows, kv_rows)?;
    d_o.check_shape("d_o", q.shape())?;
    o.check_shape("o", q.shape())?;
    lse.check_shape("lse", &[q_rows.total(), config.heads])?;
    check::devices(q.device(), [("d_o", d_o), ("o", o), ("lse", lse)])?;
    let saved = cpu::Saved {
        d_o,
        q,
        k,
        v,
        o,
        lse,
    };
    #[cfg(feature = "cuda")]
    if !q.device().is_cpu() {
        return cuda::backward(&saved, q_rows, kv_rows, config);
    }
    let mut dq = Tensor::empty(q.device(), q.shape(), DType::F32)?;
    let mut dk = Tensor::zeros(q.device(), k.shape(), DType::F32)?;
    let mut dv = Tensor::zeros(q.device(), v.shape(), DType::F32)?;
    cpu::backward(&saved, &sequences, config, &mut dq, &mut dk, &mut dv)?;
    Ok((dq, dk, dv))
}

/// One sequence: its queries and its keys.
struct Sequence {
    queries: Range<usize>,
    keys: Range<usize>,
}

impl AttentionConfig {
    fn check(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        q_rows: &Rows,
        kv_rows: &Rows,
    ) -> Result<Vec<Sequence>> {
        let refuse = |why: String| Err(Error::Argument(format!("attention: {why}")));
        let AttentionConfig {
            heads,
            kv_heads,
            head_dim,
            window,
            ..
        } = *self;
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) || head_dim == 0 {
            return refuse(format!(
                "{heads} heads of {head_dim} elements cannot share {kv_heads} key heads"
            ));
        }
        if window == Some(0) {
            return refuse("a window of 0 leaves no key to see".into());
        }
        q.check_shape("q", &[q_rows.total(), heads * head_dim])?;
        q.tokens("q", "[tokens, heads * head_dim]")?;
        let (kv_tokens, _) = k.matrix("k", "[kv_tokens, kv_heads * head_dim]")?;
        k.check_shape("k", &[kv_tokens.max(kv_rows.total()), kv_heads * head_dim])?;
        v.check_shape("v", k.shape())?;
        check::devices(
            q.device(),
            [
                ("k", k),
                ("v", v),
                ("q_rows", q_rows.cu_seqlens()),
                ("kv_rows", kv_rows.cu_seqlens()),
            ],
        )?;
        if q_rows.count() != kv_rows.count() {
            return refuse(format!(
                "{} sequences of queries, but {} of keys",
                q_rows.count(),
                kv_rows.count()
            ));
        }
        let sequences: Vec<_> = q_rows
            .iter()
            .zip(kv_rows.iter())
            .map(|(queries, keys)| Sequence { queries, keys })
            .collect();
        match sequences
            .iter()
            .position(|s| s.keys.len() < s.queries.len())
        {
            Some(index) => refuse(format!("sequence {index} has fewer keys than queries")),
            None => Ok(sequences),
        }
    }
}
