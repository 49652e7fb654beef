//! How much memory training takes, part by part, before it starts.

use crate::adapter::Target;
use crate::config::{DecoderConfig, NormKind};

/// What a training run holds at its peak, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct MemoryEstimate {
    /// Frozen weights.
    pub weights: u64,
    /// Adapter, its gradients, and AdamW's two moments.
    pub adapter: u64,
    /// What blocks keep for backward.
    pub activations: u64,
    /// The largest working set of one block or of the head.
    pub workspace: u64,
}

/// The run to estimate.
#[derive(Debug, Clone, Copy)]
pub struct TrainingShape {
    /// Tokens of one batch.
    pub tokens: usize,
    /// Bytes of an element of the frozen matrices.
    pub weight_bytes: usize,
    /// Bytes of an element of the activations: 4 on the CPU, elsewhere as the frozen matrices.
    pub activation_bytes: usize,
    /// Parameters that are trained beside the updates.
    pub whole_parameters: usize,
    /// Whether adapted modules have bases of their own beside the model's weights.
    pub own_bases: bool,
    /// Whether blocks keep only their input.
    pub gradient_checkpointing: bool,
}

/// Targets that the head computes at once.
const HEAD_ROWS: usize = crate::batch::TARGETS_PER_CHUNK;

impl MemoryEstimate {
    /// The sum of the parts.
    pub fn total(&self) -> u64 {
        self.weights + self.adapter + self.activations + self.workspace
    }

    /// Estimates LoRA training of a model on `targets`.
    pub fn new(config: &DecoderConfig, targets: &[Target], shape: TrainingShape) -> MemoryEstimate {
        let f32_bytes = size_of::<f32>() as u64;
        let activation_bytes = shape.activation_bytes as u64;
        let [hidden, inner, vocab, layers, tokens] = [
            config.hidden_size,
            config.intermediate_size,
            config.vocab_size,
            config.num_layers,
            shape.tokens,
        ]
        .map(|n| n as u64);
        let q_width = (config.num_heads * config.head_dim) as u64;
        let kv_width = (config.num_kv_heads * config.head_dim) as u64;

        let block_matrices =
            hidden * (2 * q_width + 2 * kv_width + config.mlp.matrices() as u64 * inner);
        let tables = if config.tie_word_embeddings { 1 } else { 2 };
        let weights = (layers * block_matrices + tables * vocab * hidden)
            * shape.weight_bytes as u64
            + (2 * layers + 1) * hidden * f32_bytes;

        let bases: u64 = targets
            .iter()
            .map(|t| (t.in_features * t.out_features * shape.weight_bytes) as u64)
            .sum();
        let weights = weights + if shape.own_bases { bases } else { 0 };

        let updates: u64 = targets.iter().map(|t| t.parameter_count() as u64).sum();
        let parameters = updates + shape.whole_parameters as u64;
        // DoRA keeps each output before its magnitudes too.
        let directions: u64 = targets
            .iter()
            .filter(|t| t.use_dora)
            .map(|t| t.out_features as u64)
            .sum();
        let ranks: u64 = targets.iter().map(|t| t.rank as u64).sum();

        // Two residual sums, q, k, v, the attention's output, the MLP's inner projections; in f32 statistics and
        // low-rank activations.
        let inner_kept = (config.mlp.matrices() as u64 - 1) * inner;
        let statistics = match config.norm {
            NormKind::Rms => 2,
            NormKind::Layer => 4,
        };
        let wide = tokens * (2 * hidden + 2 * q_width + 2 * kv_width + inner_kept);
        let narrow = tokens * (config.num_heads as u64 + statistics)
            + (ranks + directions) * tokens / layers.max(1);
        let block = wide * activation_bytes + narrow * f32_bytes;
        let kept = if shape.gradient_checkpointing {
            layers * hidden * tokens * activation_bytes + block
        } else {
            layers * block
        };

        // Backward through the MLP: two gradients in place of gate and up, the activation's gradient, the
        // normed input and two residual gradients. The head: logits, and its rows in and out.
        // With DoRA, two gradients before the magnitudes outlive the activation's.
        let inner_gradients = if directions > 0 { 2 } else { 1 };
        let mlp = tokens * (inner_gradients * inner + 4 * hidden);
        let attention = tokens * (3 * q_width + 2 * kv_width + 3 * hidden);
        let rows = tokens.min(HEAD_ROWS as u64);
        let head = rows * (vocab + 6 * hidden) + tokens * hidden;
        MemoryEstimate {
            weights,
            adapter: 4 * parameters * f32_bytes,
            activations: kept,
            workspace: mlp.max(attention).max(head) * activation_bytes,
        }
    }
}
