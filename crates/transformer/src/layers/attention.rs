//! Causal self-attention with grouped-query heads and rotary positions.

use fuselora_tensor::Tensor;
use fuselora_tensor::ops::attention::{self, AttentionConfig, Rows};
use fuselora_tensor::ops::kv_cache;
use fuselora_tensor::ops::rope::{self, RopeTable};

use super::linear::{self, Linear};
use crate::error::Result;
use crate::lora::{LoraGradients, Pass};

/// The attention of one block.
pub struct Attention {
    /// `[heads * head_dim, hidden]`.
    pub q_proj: Linear,
    /// `[kv_heads * head_dim, hidden]`.
    pub k_proj: Linear,
    /// `[kv_heads * head_dim, hidden]`.
    pub v_proj: Linear,
    /// `[hidden, heads * head_dim]`.
    pub o_proj: Linear,
    /// Heads, their width, the scale of the scores, the window.
    pub config: AttentionConfig,
}

/// Where the tokens of a pass stand.
pub struct Place<'a> {
    /// Position of each token in its row, `[tokens]` U32.
    pub positions: &'a Tensor,
    /// Boundaries of the rows that are concatenated.
    pub rows: &'a Rows,
    /// Rotary table that covers every position.
    pub rope: &'a RopeTable,
}

/// What backward needs: rotated queries and keys, values, the output and its log-sum-exp.
pub struct Saved {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    h: [Option<Tensor>; 4],
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
    /// `x [tokens, hidden]` to the attention's output, `[tokens, hidden]`.
    pub fn forward(
        &self,
        x: &Tensor,
        place: &Place<'_>,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, Saved)> {
        let ([q, k, v], [hq, hk, hv]) = self.project(x, place, pass)?;
        let (o, lse) = attention::forward(&q, &k, &v, place.rows, place.rows, &self.config)?;
        pass.check(&o, || format!("attention before {}", self.o_proj.name))?;
        let [y] = linear::forward(&o, [&self.o_proj], pass)?;
        Ok((
            y.y,
            Saved {
                q,
                k,
                v,
                o,
                lse,
                h: [hq, hk, hv, y.h],
            },
        ))
    }

    /// The same for the newest tokens of one row, with the keys and values before them in `cache`.
    pub fn forward_cached(
        &self,
        x: &Tensor,
        place: &Place<'_>,
        pass: &Pass<'_>,
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        let ([q, k, v], _) = self.project(x, place, pass)?;
        kv_cache::append(&mut cache.k, cache.len, &k)?;
        kv_cache::append(&mut cache.v, cache.len, &v)?;
        cache.len += place.rows.total();
        let kv_rows = Rows::new(x.device(), &[cache.len])?;
        let (o, _) =
            attention::forward(&q, &cache.k, &cache.v, place.rows, &kv_rows, &self.config)?;
        let [y] = linear::forward(&o, [&self.o_proj], pass)?;
        Ok(y.y)
    }

    fn project(
        &self,
        x: &Tensor,
        place: &Place<'_>,
        pass: &Pass<'_>,
    ) -> Result<([Tensor; 3], [Option<Tensor>; 3])> {
        let [mut q, mut k, v] =
            linear::forward(x, [&self.q_proj, &self.k_proj, &self.v_proj], pass)?;
        rope::apply(&mut q.y, self.config.heads, place.positions, place.rope)?;
        rope::apply(&mut k.y, self.config.kv_heads, place.positions, place.rope)?;
        Ok(([q.y, k.y, v.y], [q.h, k.h, v.h]))
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
            h: [hq, hk, hv, ho],
        } = saved;
        let d_o = linear::backward(
            o,
            [&self.o_proj],
            [dy],
            [ho.as_ref()],
            pass,
            gradients,
            true,
        )?;
        let Some(d_o) = d_o else { return Ok(None) };
        let (mut dq, mut dk, dv) =
            attention::backward(&d_o, q, k, v, o, lse, place.rows, place.rows, &self.config)?;
        pass.check(&dq, || {
            format!("the query gradient of {}", self.q_proj.name)
        })?;
        rope::apply_inverse(&mut dq, self.config.heads, place.positions, place.rope)?;
        rope::apply_inverse(&mut dk, self.config.kv_heads, place.positions, place.rope)?;
        let linears = [&self.q_proj, &self.k_proj, &self.v_proj];
        linear::backward(
            x,
            linears,
            [&dq, &dk, &dv],
            [hq.as_ref(), hk.as_ref(), hv.as_ref()],
            pass,
            gradients,
            need_dx,
        )
    }
}
