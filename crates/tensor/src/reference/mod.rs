//! The forward operations in plain f64, one obvious loop each. Only tests use them: they hold the fast
//! operations against these, and the backward passes against their finite differences.
//!
//! All arrays are row-major slices; the extents that a slice does not tell are arguments.

use crate::{
    ops::lora_linear::Dropout,
    philox::{philox4x32_10, uniform},
};
use std::f64::consts::{PI, SQRT_2};

/// `y[t][o] = Σ_i x[t][i]·w[o][i]`, with `x [tokens, in]`, `w [out, in]`.
pub fn linear(x: &[f64], w: &[f64], in_features: usize) -> Vec<f64> {
    let mut y = Vec::new();
    for x in x.chunks_exact(in_features) {
        for w in w.chunks_exact(in_features) {
            y.push(x.iter().zip(w).map(|(x, w)| x * w).sum());
        }
    }
    y
}

/// The low-rank update of [`lora_linear`].
pub struct Lora<'a> {
    /// `[rank, in]`.
    pub a: &'a [f64],
    /// `[out, rank]`.
    pub b: &'a [f64],
    /// The rank.
    pub rank: usize,
    /// The factor of the update.
    pub scaling: f64,
    /// What each element of `x` is multiplied with for the update, from [`dropout_keep`].
    pub keep: &'a [f64],
}

/// `y = x·wᵀ + bias + scaling·(keep·x)·aᵀ·bᵀ`.
pub fn lora_linear(
    x: &[f64],
    w: &[f64],
    bias: Option<&[f64]>,
    lora: Option<&Lora>,
    in_features: usize,
) -> Vec<f64> {
    let mut y = linear(x, w, in_features);
    let out_features = w.len() / in_features;
    if let Some(lora) = lora {
        let dropped: Vec<f64> = x.iter().zip(lora.keep).map(|(x, keep)| x * keep).collect();
        let h = linear(&dropped, lora.a, in_features);
        for (y, update) in y.iter_mut().zip(linear(&h, lora.b, lora.rank)) {
            *y += lora.scaling * update;
        }
    }
    if let Some(bias) = bias {
        for y in y.chunks_exact_mut(out_features) {
            y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
        }
    }
    y
}

/// For each of `count` elements 0 or `1/(1 - probability)`, by the rule that [`Dropout`] documents.
pub fn dropout_keep(dropout: Option<Dropout>, count: usize) -> Vec<f64> {
    let Some(Dropout {
        probability,
        seed,
        stream,
        step,
    }) = dropout
    else {
        return vec![1.0; count];
    };
    let step = step.to_u32_vec().expect("a step is U32 and can be read")[0];
    let keep = |index: u64| {
        let counter = [(index / 4) as u32, (index >> 34) as u32, stream, step];
        let word = philox4x32_10([seed as u32, (seed >> 32) as u32], counter)[(index % 4) as usize];
        if uniform(word) >= probability {
            1.0 / (1.0 - f64::from(probability))
        } else {
            0.0
        }
    };
    (0..count as u64).map(keep).collect()
}

/// `y = x / √(mean(x²) + eps) · weight` for each row of `weight.len()` elements.
pub fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let mut y = Vec::new();
    for x in x.chunks_exact(weight.len()) {
        let mean_square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        y.extend(
            x.iter()
                .zip(weight)
                .map(|(x, weight)| x / (mean_square + eps).sqrt() * weight),
        );
    }
    y
}

/// `y = (x - mean) / √(var + eps) · weight + bias` for each row of `weight.len()` elements.
pub fn layer_norm(x: &[f64], weight: &[f64], bias: &[f64], eps: f64) -> Vec<f64> {
    let mut y = Vec::new();
    for x in x.chunks_exact(weight.len()) {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / x.len() as f64;
        for ((x, weight), bias) in x.iter().zip(weight).zip(bias) {
            y.push((x - mean) / (variance + eps).sqrt() * weight + bias);
        }
    }
    y
}

/// Turns element `i` of each head with element `i + inv_freq.len()` by `position · inv_freq[i]`.
pub fn rope(
    x: &[f64],
    head_dim: usize,
    heads: usize,
    positions: &[u32],
    inv_freq: &[f64],
) -> Vec<f64> {
    let mut y = x.to_vec();
    for (row, &position) in y.chunks_exact_mut(heads * head_dim).zip(positions) {
        for head in row.chunks_exact_mut(head_dim) {
            for (i, frequency) in inv_freq.iter().enumerate() {
                let (sin, cos) = (f64::from(position) * frequency).sin_cos();
                let (a, b) = (head[i], head[i + inv_freq.len()]);
                head[i] = a * cos - b * sin;
                head[i + inv_freq.len()] = b * cos + a * sin;
            }
        }
    }
    y
}

/// The extents of [`attention`].
pub struct Attention<'a> {
    /// Queries of each sequence.
    pub q_lengths: &'a [usize],
    /// Keys of each sequence.
    pub kv_lengths: &'a [usize],
    /// Query heads.
    pub heads: usize,
    /// Key heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f64,
    /// The sliding window.
    pub window: Option<usize>,
}

/// Causal attention of each sequence and head, one query at a time. Returns `(o, lse)`.
pub fn attention(q: &[f64], k: &[f64], v: &[f64], shape: &Attention) -> (Vec<f64>, Vec<f64>) {
    let &Attention {
        heads,
        kv_heads,
        head_dim,
        scale,
        ..
    } = shape;
    let (mut o, mut lse) = (Vec::new(), Vec::new());
    let (mut first_query, mut first_key) = (0, 0);
    for (&queries, &keys) in shape.q_lengths.iter().zip(shape.kv_lengths) {
        for query in 0..queries {
            let position = query + keys - queries;
            let first_visible = shape
                .window
                .map_or(0, |window| (position + 1).saturating_sub(window));
            for head in 0..heads {
                let q = &q[((first_query + query) * heads + head) * head_dim..][..head_dim];
                let kv = |x: &[f64], key: usize, i: usize| {
                    x[((first_key + key) * kv_heads + head * kv_heads / heads) * head_dim + i]
                };
                let weights: Vec<f64> = (first_visible..=position)
                    .map(|key| {
                        (scale * (0..head_dim).map(|i| q[i] * kv(k, key, i)).sum::<f64>()).exp()
                    })
                    .collect();
                let sum: f64 = weights.iter().sum();
                for i in 0..head_dim {
                    let weighted = weights
                        .iter()
                        .zip(first_visible..)
                        .map(|(weight, key)| weight * kv(v, key, i));
                    o.push(weighted.sum::<f64>() / sum);
                }
                lse.push(sum.ln());
            }
        }
        (first_query, first_key) = (first_query + queries, first_key + keys);
    }
    (o, lse)
}

/// `gate·σ(gate)·up`.
pub fn swiglu(gate: &[f64], up: &[f64]) -> Vec<f64> {
    gate.iter()
        .zip(up)
        .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
        .collect()
}

/// `0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`.
pub fn gelu_tanh(x: &[f64]) -> Vec<f64> {
    x.iter()
        .map(|x| 0.5 * x * (1.0 + ((2.0 / PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()))
        .collect()
}

/// `0.5·x·(1 + erf(x/√2))`.
pub fn gelu_erf(x: &[f64]) -> Vec<f64> {
    x.iter()
        .map(|x| 0.5 * x * (1.0 + erf(x / SQRT_2)))
        .collect()
}

/// The error function by its Taylor series, to 1e-9 for |x| < 4 and 1 to that accuracy beyond.
fn erf(x: f64) -> f64 {
    if x.abs() >= 4.5 {
        return x.signum();
    }
    let (mut power, mut sum) = (x, x);
    for n in 1..120 {
        power *= -x * x / f64::from(n);
        sum += power / f64::from(2 * n + 1);
    }
    2.0 / PI.sqrt() * sum
}

/// `Σ -log softmax(logits)[target]`.
pub fn cross_entropy(logits: &[f64], targets: &[u32], vocab: usize) -> f64 {
    let rows = logits.chunks_exact(vocab).zip(targets);
    rows.map(|(row, &target)| {
        row.iter()
            .map(|x| (x - row[target as usize]).exp())
            .sum::<f64>()
            .ln()
    })
    .sum()
}

/// One parameter of [`adamw`].
#[derive(Debug, Clone, Copy)]
pub struct AdamWState {
    /// The parameter.
    pub param: f64,
    /// The mean of the gradient.
    pub m: f64,
    /// The mean of the squared gradient.
    pub v: f64,
}

/// One AdamW step, in the order of PyTorch's documentation; `betas` and `step` from 1.
pub fn adamw(
    state: AdamWState,
    grad: f64,
    lr: f64,
    betas: (f64, f64),
    eps: f64,
    weight_decay: f64,
    step: i32,
) -> AdamWState {
    let param = state.param - lr * weight_decay * state.param;
    let m = betas.0 * state.m + (1.0 - betas.0) * grad;
    let v = betas.1 * state.v + (1.0 - betas.1) * grad * grad;
    let m_hat = m / (1.0 - betas.0.powi(step));
    let v_hat = v / (1.0 - betas.1.powi(step));
    AdamWState {
        param: param - lr * m_hat / (v_hat.sqrt() + eps),
        m,
        v,
    }
}
