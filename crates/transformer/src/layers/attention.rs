//! Causal self-attention with grouped-query heads, with rotary positions or without.

use fuselora_tensor::Tensor;
use fuselora_tensor::ops::attention::{self, AttentionConfig, Rows};
use fuselora_tensor::ops::rope::{self, RopeTable};
use fuselora_tensor::ops::{columns, gather, kv_cache};

use super::linear::{self, Linear};
use super::norm::{Norm, Statistics};
use crate::error::{Error, Result};
use crate::lora::{LoraGradients, Pass};

/// The attention of one block.
pub struct Attention {
    /// Queries `[heads * head_dim, hidden]`, keys and values `[kv_heads * head_dim, hidden]`.
    pub qkv: Qkv,
    /// Norms of each head's queries and keys, over `head_dim`.
    pub qk_norm: Option<[Norm; 2]>,
    /// `[hidden, heads * head_dim]`.
    pub o_proj: Linear,
    /// Heads, their width, the scale of the scores, the window.
    pub config: AttentionConfig,
}

/// The projections to queries, keys and values.
pub enum Qkv {
    /// One each; behind a box, because a model has either many of these or none.
    Split(Box<[Linear; 3]>),
    /// One whose output is all three side by side.
    Fused(Linear),
}

/// Where the tokens of a pass stand.
pub struct Place<'a> {
    /// Position of each token in its row, `[tokens]` U32.
    pub positions: &'a Tensor,
    /// Boundaries of the rows that are concatenated.
    pub rows: &'a Rows,
    /// Rotary table that covers every position, unless positions are learned.
    pub rope: Option<&'a RopeTable>,
}

/// What backward needs: rotated queries and keys, values, the output and its log-sum-exp.
pub struct Saved {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    normed: Option<[Normed; 2]>,
    qkv: SavedQkv,
    output: linear::Saved,
}

enum SavedQkv {
    Split(Box<[linear::Saved; 3]>),
    Fused(Box<linear::Saved>),
}

/// What a head norm started from.
struct Normed {
    x: Tensor,
    statistics: Statistics,
}

struct Projected {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normed: Option<[Normed; 2]>,
    saved: SavedQkv,
}

/// Keys and values of one row, kept between the steps of a generation.
pub struct KvCache {
    k: Tensor,
    v: Tensor,
    len: usize,
}

impl KvCache {
    pub(crate) fn new(k: Tensor, v: Tensor) -> KvCache {
        KvCache { k, v, len: 0 }
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing was appended yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Attention {
    /// Every projection.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        let qkv = match &self.qkv {
            Qkv::Split(linears) => &linears[..],
            Qkv::Fused(linear) => std::slice::from_ref(linear),
        };
        qkv.iter().chain([&self.o_proj])
    }

    /// `x [tokens, hidden]` to the attention's output, `[tokens, hidden]`.
    pub fn forward(
        &self,
        x: &Tensor,
        place: &Place<'_>,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, Saved)> {
        let Projected {
            q,
            k,
            v,
            normed,
            saved,
        } = self.project(x, place, pass)?;
        let (o, lse) = attention::forward(&q, &k, &v, place.rows, place.rows, &self.config)?;
        pass.check(&o, || format!("attention before {}", self.o_proj.name))?;
        let [y] = linear::forward(&o, [&self.o_proj], pass)?;
        let saved = Saved {
            q,
            k,
            v,
            o,
            lse,
            normed,
            qkv: saved,
            output: y.saved,
        };
        Ok((y.y, saved))
    }

    /// The newest tokens of each row, whose earlier keys and values are in its cache.
    pub fn forward_cached(
        &self,
        x: &Tensor,
        place: &Place<'_>,
        pass: &Pass<'_>,
        caches: &mut [KvCache],
    ) -> Result<Tensor> {
        let Projected { q, k, v, .. } = self.project(x, place, pass)?;
        let o = match caches {
            [cache] => self.attend(&q, &k, &v, place.rows, cache)?,
            caches => {
                let mut o = Tensor::empty(x.device(), q.shape(), q.dtype())?;
                for (tokens, cache) in place.rows.iter().zip(caches) {
                    let ids: Vec<u32> = tokens.clone().map(|token| token as u32).collect();
                    let ids = Tensor::from_u32(x.device(), [ids.len()], &ids)?;
                    let rows = Rows::new(x.device(), &[tokens.len()])?;
                    let [q, k, v] = [&q, &k, &v].map(|tensor| gather::rows(tensor, &ids));
                    let own = self.attend(&q?, &k?, &v?, &rows, cache)?;
                    kv_cache::append(&mut o, tokens.start, &own)?;
                }
                o
            }
        };
        let [y] = linear::forward(&o, [&self.o_proj], pass)?;
        Ok(y.y)
    }

    /// The newest tokens of one row to all of it.
    fn attend(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        rows: &Rows,
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        kv_cache::append(&mut cache.k, cache.len, k)?;
        kv_cache::append(&mut cache.v, cache.len, v)?;
        cache.len += rows.total();
        let kv_rows = Rows::new(q.device(), &[cache.len])?;
        Ok(attention::forward(q, &cache.k, &cache.v, rows, &kv_rows, &self.config)?.0)
    }

    fn project(&self, x: &Tensor, place: &Place<'_>, pass: &Pass<'_>) -> Result<Projected> {
        let (q, k, v, saved) = match &self.qkv {
            Qkv::Split(linears) => {
                let [q, k, v] = linear::forward(x, linears.each_ref(), pass)?;
                let saved = Box::new([q.saved, k.saved, v.saved]);
                (q.y, k.y, v.y, SavedQkv::Split(saved))
            }
            Qkv::Fused(linear) => {
                let [fused] = linear::forward(x, [linear], pass)?;
                let [q, k, v] = columns::split(&fused.y, self.widths())?;
                (q, k, v, SavedQkv::Fused(Box::new(fused.saved)))
            }
        };
        let (mut q, mut k, normed) = match &self.qk_norm {
            None => (q, k, None),
            Some([q_norm, k_norm]) => {
                let (q, saved_q) = self.norm_heads(q_norm, q, pass)?;
                let (k, saved_k) = self.norm_heads(k_norm, k, pass)?;
                (q, k, Some([saved_q, saved_k]))
            }
        };
        if let Some(table) = place.rope {
            rope::apply(&mut q, self.config.heads, place.positions, table)?;
            rope::apply(&mut k, self.config.kv_heads, place.positions, table)?;
        }
        Ok(Projected {
            q,
            k,
            v,
            normed,
            saved,
        })
    }

    /// Columns of queries, keys and values.
    fn widths(&self) -> [usize; 3] {
        let AttentionConfig {
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.config;
        [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    }

    /// Normalises each head of `x [tokens, heads * head_dim]`.
    fn norm_heads(&self, norm: &Norm, x: Tensor, pass: &Pass<'_>) -> Result<(Tensor, Normed)> {
        let shape = x.shape().clone();
        let x = self.by_head(x)?;
        let (y, statistics) = norm.forward(&x, pass)?;
        Ok((y.reshape(&shape)?, Normed { x, statistics }))
    }

    fn norm_heads_backward(
        &self,
        norm: &Norm,
        dy: Tensor,
        normed: &Normed,
        pass: &Pass<'_>,
        gradients: &mut LoraGradients,
    ) -> Result<Tensor> {
        let shape = dy.shape().clone();
        let dy = self.by_head(dy)?;
        let mut dx = Tensor::zeros(dy.device(), dy.shape(), dy.dtype())?;
        norm.backward(&dy, &normed.x, &normed.statistics, &mut dx, pass, gradients)?;
        Ok(dx.reshape(&shape)?)
    }

    /// `[tokens, heads * head_dim]` as `[tokens * heads, head_dim]`.
    fn by_head(&self, x: Tensor) -> Result<Tensor> {
        let head_dim = self.config.head_dim;
        let rows = x.element_count() / head_dim;
        Ok(x.reshape([rows, head_dim])?)
    }

    /// From the output's gradient to the input's, unless `need_dx` is false.
    #[expect(
        clippy::too_many_arguments,
        reason = "a backward pass reads what each of its parts saved"
    )]
    pub fn backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        saved: &Saved,
        place: &Place<'_>,
        pass: &Pass<'_>,
        gradients: &mut LoraGradients,
        need_dx: bool,
    ) -> Result<Option<Tensor>> {
        let Saved {
            q,
            k,
            v,
            o,
            lse,
            normed,
            qkv,
            output,
        } = saved;
        let d_o = linear::backward(o, [&self.o_proj], [dy], [output], pass, gradients, true)?;
        let Some(d_o) = d_o else { return Ok(None) };
        let (mut dq, mut dk, dv) =
            attention::backward(&d_o, q, k, v, o, lse, place.rows, place.rows, &self.config)?;
        pass.check(&dq, || {
            format!(
                "the query gradient of the attention before {}",
                self.o_proj.name
            )
        })?;
        if let Some(table) = place.rope {
            rope::apply_inverse(&mut dq, self.config.heads, place.positions, table)?;
            rope::apply_inverse(&mut dk, self.config.kv_heads, place.positions, table)?;
        }
        if let (Some([q_norm, k_norm]), Some([normed_q, normed_k])) = (&self.qk_norm, normed) {
            dq = self.norm_heads_backward(q_norm, dq, normed_q, pass, gradients)?;
            dk = self.norm_heads_backward(k_norm, dk, normed_k, pass, gradients)?;
        }
        match (&self.qkv, qkv) {
            (Qkv::Split(linears), SavedQkv::Split(saved)) => linear::backward(
                x,
                linears.each_ref(),
                [&dq, &dk, &dv],
                saved.each_ref(),
                pass,
                gradients,
                need_dx,
            ),
            (Qkv::Fused(linear), SavedQkv::Fused(saved)) => {
                let d_fused = columns::join([&dq, &dk, &dv])?;
                linear::backward(x, [linear], [&d_fused], [saved], pass, gradients, need_dx)
            }
            _ => Err(Error::Input(
                "an attention was given what one of another layout saved".into(),
            )),
        }
    }
}
