//! The modules of a model, known before it is loaded.

use crate::adapter::{Module, ModuleKind};
use crate::config::{DecoderConfig, NormKind};
use crate::families::{AttentionNames, Family, OUTPUT_HEAD};

/// The modules of a model, in the order that [`super::Model::modules`] gives: the projections of the blocks, the
/// output head, the embeddings, the norms.
pub fn modules(family: &Family, config: &DecoderConfig) -> Vec<Module> {
    let layout = family.layout;
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (q_width, kv_width) = (
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    );
    let biases = config.biases;
    let mut projections = match layout.attention {
        AttentionNames::Split([q, k, v]) => vec![
            (q, q_width, hidden, biases.qkv),
            (k, kv_width, hidden, biases.qkv),
            (v, kv_width, hidden, biases.qkv),
        ],
        AttentionNames::Fused(name) => vec![(name, q_width + 2 * kv_width, hidden, biases.qkv)],
    };
    projections.push((layout.attention_output, hidden, q_width, biases.output));
    projections.extend(
        layout
            .mlp
            .gate
            .map(|gate| (gate, inner, hidden, biases.mlp)),
    );
    projections.push((layout.mlp.up, inner, hidden, biases.mlp));
    projections.push((layout.mlp.down, hidden, inner, biases.mlp));
    let mut norms = vec![
        (layout.input_norm, hidden),
        (layout.post_attention_norm, hidden),
    ];
    if config.qk_norm {
        norms.extend(super::QK_NORMS.map(|name| (name, config.head_dim)));
    }

    let mut modules = Vec::new();
    let mut push = |name: String, kind, in_features, out_features, bias| {
        modules.push(Module {
            tied: name == OUTPUT_HEAD && config.tie_word_embeddings,
            name,
            kind,
            in_features,
            out_features,
            bias,
        });
    };
    for layer in 0..config.num_layers {
        for &(part, out_features, in_features, bias) in &projections {
            let name = layout.block(layer, part);
            let kind = if layout.is_transposed(&name) {
                ModuleKind::Conv1d
            } else {
                ModuleKind::Linear
            };
            push(name, kind, in_features, out_features, bias);
        }
    }
    let vocab = config.vocab_size;
    push(
        OUTPUT_HEAD.to_owned(),
        ModuleKind::Linear,
        hidden,
        vocab,
        false,
    );
    push(
        layout.path(layout.embedding),
        ModuleKind::Embedding,
        vocab,
        hidden,
        false,
    );
    if let Some(positions) = layout.positions {
        let longest = config.max_position_embeddings;
        push(
            layout.path(positions),
            ModuleKind::Embedding,
            longest,
            hidden,
            false,
        );
    }
    let bias = config.norm == NormKind::Layer;
    for layer in 0..config.num_layers {
        for &(part, width) in &norms {
            push(
                layout.block(layer, part),
                ModuleKind::Norm,
                width,
                width,
                bias,
            );
        }
    }
    push(
        layout.path(layout.norm),
        ModuleKind::Norm,
        hidden,
        hidden,
        bias,
    );
    modules
}
