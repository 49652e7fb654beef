//! How fast each parameter learns: all alike, or LoRA+ (Hayou et al. 2024) by the rule of PEFT's
//! `create_loraplus_optimizer`.

use fuselora_transformer::adapter::{Module, ModuleKind};
use fuselora_transformer::lora::Lora;

use crate::cli::OptimizationArgs;

/// What is a parameter's own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Times the schedule's learning rate.
    pub factor: f64,
    /// AdamW's.
    pub weight_decay: f64,
}

/// The rates of an adapter's parameters, in the order of [`Lora::parameters`].
pub fn of(lora: &Lora, modules: &[Module], settings: &OptimizationArgs) -> Vec<Rate> {
    let weight_decay = settings.weight_decay;
    let rate = |name: &str, dimensions: usize| {
        let Some(ratio) = settings.loraplus_lr_ratio else {
            let factor = 1.0;
            return Rate {
                factor,
                weight_decay,
            };
        };
        if name.contains("lora_embedding_") {
            return Rate {
                factor: settings.loraplus_lr_embedding / settings.learning_rate,
                weight_decay,
            };
        }
        let of_b = name.contains("lora_B") || dimensions == 1;
        // Of norms, PyTorch's LayerNorm alone: the one with a bias.
        let of_layer_norm = modules.iter().any(|module| {
            module.kind == ModuleKind::Norm
                && module.bias
                && name == format!("base_model.model.{}.weight", module.name)
        });
        let decays = !of_b || !(name.contains("bias") || of_layer_norm);
        Rate {
            factor: if of_b { ratio } else { 1.0 },
            weight_decay: if decays { weight_decay } else { 0.0 },
        }
    };
    lora.parameters()
        .map(|(name, tensor)| rate(&name, tensor.shape().len()))
        .collect()
}
