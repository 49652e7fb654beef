//! The adapter that a run starts from.

use fuselora_tensor::Purpose;
use fuselora_transformer::adapter::{Adapter, AdapterConfig, InitLoraWeights, ModuleSelector};
use fuselora_transformer::lora::Lora;

use super::saved_state;
use crate::base_model::BaseModel;
use crate::cli::{LoraArgs, TokensArg, TrainConfig};

/// The saved one when resuming, the one that `--adapter` names, or a new one.
///
/// # Errors
/// A target that matches nothing, or files that are missing, damaged or of another model.
pub fn start(config: &TrainConfig, base: &BaseModel) -> anyhow::Result<Lora> {
    if config.resume {
        return base.adapter(&saved_state::folder(config.output()?));
    }
    if let Some(folder) = &config.adapter {
        return base.adapter(folder);
    }
    let mut peft = peft_config(&config.lora);
    peft.base_model_name_or_path = Some(config.model()?.display().to_string());
    let (model, seed) = (&base.model, config.optimization.seed);
    let _holding = model.device().hold(Purpose::Adapter);
    let adapter = Adapter::new(peft, model.modules(), model.device(), seed, Some(model))?;
    Ok(Lora::bind(adapter, model)?)
}

/// PEFT's configuration of the adapter that the flags describe.
pub fn peft_config(arguments: &LoraArgs) -> AdapterConfig {
    let mut peft = AdapterConfig::new(
        arguments.rank,
        arguments.lora_alpha,
        selector(&arguments.target_modules),
    );
    peft.dropout = arguments.lora_dropout as f32;
    peft.use_rslora = arguments.use_rslora;
    peft.use_dora = arguments.use_dora;
    peft.init_lora_weights = match arguments.init_lora_weights.0 {
        InitLoraWeights::Loftq { .. } => InitLoraWeights::Loftq {
            iterations: arguments.loftq_iter,
        },
        init => init,
    };
    peft.bias = arguments.bias.into();
    peft.lora_bias = arguments.lora_bias;
    peft.modules_to_save = names(arguments.modules_to_save.as_deref().unwrap_or_default());
    if let Some(TokensArg(tokens)) = &arguments.trainable_token_indices {
        peft.trainable_token_indices = tokens.clone();
    }
    peft
}

/// `all-linear`, a list of names, or a regular expression: names have only letters, digits, `_`, `-` and `.`.
fn selector(text: &str) -> ModuleSelector {
    let is_name = |name: &str| {
        name.chars()
            .all(|c| c.is_alphanumeric() || "_-.".contains(c))
    };
    let names = names(text);
    if text == "all-linear" {
        ModuleSelector::AllLinear
    } else if !names.is_empty() && names.iter().all(|name| is_name(name)) {
        ModuleSelector::Names(names)
    } else {
        ModuleSelector::Regex(text.to_owned())
    }
}

fn names(list: &str) -> Vec<String> {
    let names = list.split(',').map(str::trim);
    let names = names.filter(|name| !name.is_empty());
    names.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_modules_are_names_or_a_regular_expression() {
        assert_eq!(selector("all-linear"), ModuleSelector::AllLinear);
        let names = ["q_proj", "model.layers.0.mlp.up_proj"]
            .map(str::to_owned)
            .to_vec();
        assert_eq!(
            selector("q_proj, model.layers.0.mlp.up_proj"),
            ModuleSelector::Names(names)
        );
        for regex in [r".*\.(q|v)_proj", r"model\.layers\.[01]\..*"] {
            assert_eq!(selector(regex), ModuleSelector::Regex(regex.to_owned()));
        }
    }
}
