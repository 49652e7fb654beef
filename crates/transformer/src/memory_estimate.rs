//! How much memory training takes, part by part, before it starts.

use fuselora_tensor::DType;
use fuselora_tensor::ops::lora_linear::dequantized_bytes;

use crate::adapter::Target;
use crate::batch::targets_per_chunk;
use crate::config::{DecoderConfig, NormKind};

/// What a training run holds at its peak, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct MemoryEstimate {
    /// Frozen weights, those in mapped files included.
    pub weights: u64,
    /// The adapter's parameters.
    pub adapter: u64,
    /// Their gradients.
    pub gradients: u64,
    /// AdamW's two moments.
    pub optimizer: u64,
    /// What blocks keep for backward.
    pub activations: u64,
    /// The largest working set of one block or of the head.
    pub workspace: u64,
    /// What else a process on the CPU has in memory: its code, the tokenizer, rows. Nothing on other devices, whose
    /// memory is their own.
    pub program: u64,
}

/// As measured with a tokenizer of 49,000 tokens.
const PROGRAM_BYTES: u64 = 96 << 20;

/// The run to estimate.
#[derive(Debug, Clone, Copy)]
pub struct TrainingShape {
    /// Tokens of one batch.
    pub tokens: usize,
    /// Bytes of the frozen weights, from [`crate::model::Model::weight_bytes_when_loaded`].
    pub weight_bytes: u64,
    /// Bytes of an element of a base that an adapted module has beside the model's weights; 0 where none has one.
    pub own_base_bytes: usize,
    /// The type of the activations: F32 on the CPU, elsewhere that of the weights that are floats.
    pub activations: DType,
    /// Whether the projections of the blocks are in NF4.
    pub quantized: bool,
    /// Parameters that are trained beside the updates.
    pub whole_parameters: usize,
    /// Bytes of what a step computes of them, from [`crate::adapter::AdapterConfig::derived_bytes`].
    pub derived_bytes: u64,
    /// Whether moments are held in 8 bits where a parameter is large enough.
    pub moments_in_8_bits: bool,
    /// Whether blocks keep only their input.
    pub gradient_checkpointing: bool,
    /// Whether it trains on the CPU.
    pub on_cpu: bool,
}

/// Elements of a parameter from which on its moments are held in 8 bits (bitsandbytes' `min_8bit_size`).
pub const MIN_8BIT_SIZE: usize = 4096;
/// Elements of a moment in 8 bits that share an f32.
const BLOCK_OF_MOMENTS: u64 = 256;

impl MemoryEstimate {
    /// The sum of the parts.
    pub fn total(&self) -> u64 {
        self.weights
            + self.adapter
            + self.gradients
            + self.optimizer
            + self.activations
            + self.workspace
            + self.program
    }

    /// Estimates LoRA training of a model on `targets`.
    pub fn new(config: &DecoderConfig, targets: &[Target], shape: TrainingShape) -> MemoryEstimate {
        let f32_bytes = size_of::<f32>() as u64;
        let activation_bytes = shape.activations.size_in_bytes() as u64;
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

        let bases: u64 = targets
            .iter()
            .map(|t| (t.in_features * t.out_features * shape.own_base_bytes) as u64)
            .sum();
        let updates: u64 = targets.iter().map(|t| t.parameter_count() as u64).sum();
        let parameters = updates + shape.whole_parameters as u64;
        let in_8_bits: u64 = targets
            .iter()
            .filter(|_| shape.moments_in_8_bits)
            .flat_map(|t| [t.rank * t.in_features, t.out_features * t.rank])
            .filter(|&elements| elements >= MIN_8BIT_SIZE)
            .map(|elements| elements as u64)
            .sum();
        let moments = 2 * (in_8_bits + in_8_bits.div_ceil(BLOCK_OF_MOMENTS) * f32_bytes)
            + 2 * (parameters - in_8_bits) * f32_bytes;
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
        let narrow =
            tokens * (config.num_heads as u64 + statistics) + ranks * tokens / layers.max(1);
        let wide = wide + directions * tokens / layers.max(1);
        let block = wide * activation_bytes + narrow * f32_bytes;
        // Backward through the MLP: two gradients in place of gate and up, the activation's gradient, the
        // normed input and two residual gradients. The head: logits, and its rows in and out.
        // With DoRA, two gradients before the magnitudes outlive the activation's.
        let inner_gradients = if directions > 0 { 2 } else { 1 };
        let mlp = tokens * (inner_gradients * inner + 4 * hidden);
        let attention = tokens * (3 * q_width + 2 * kv_width + 3 * hidden);
        let rows = tokens.min(targets_per_chunk(shape.on_cpu) as u64);
        let head = rows * (vocab + 6 * hidden) + tokens * hidden;
        let inputs = layers * hidden * tokens * activation_bytes;
        // On a GPU, weights in NF4 are dequantized for the projections that share an input.
        let decoded = |groups: [u64; 2]| match shape.quantized && !shape.on_cpu {
            true => groups
                .map(|n| dequantized_bytes(shape.tokens, shape.activations, n as usize) as u64)
                .into_iter()
                .max()
                .unwrap_or(0),
            false => 0,
        };
        let outer = config.mlp.matrices() as u64 - 1;
        let of_mlp = decoded([outer * inner * hidden, inner * hidden]);
        let of_attention = decoded([(q_width + 2 * kv_width) * hidden, q_width * hidden]);
        let [mlp, attention, head] = [mlp, attention, head].map(|n| n * activation_bytes);
        let (mlp, attention) = (mlp + of_mlp, attention + of_attention);
        // A block that was not kept is there again while its backward pass runs, when the head is done.
        let (activations, workspace) = if shape.gradient_checkpointing {
            (inputs, head.max(block + mlp.max(attention)))
        } else {
            (layers * block, head.max(mlp).max(attention))
        };
        MemoryEstimate {
            weights: shape.weight_bytes + bases,
            adapter: parameters * f32_bytes + shape.derived_bytes,
            gradients: parameters * f32_bytes,
            optimizer: moments,
            activations,
            workspace,
            program: if shape.on_cpu { PROGRAM_BYTES } else { 0 },
        }
    }
}
