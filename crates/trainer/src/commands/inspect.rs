//! `fuselora inspect`.

use std::io::{Write, stdout};

use fuselora_tensor::{DType, Device};
use fuselora_trainer::cli::{DeviceArg, InspectArgs, OptimArg};
use fuselora_trainer::machine;
use fuselora_trainer::train::peft_config;
use fuselora_transformer::adapter::{Adapter, AdapterConfig};
use fuselora_transformer::checkpoint::Checkpoint;
use fuselora_transformer::families;
use fuselora_transformer::memory_estimate::{MemoryEstimate, TrainingShape};
use fuselora_transformer::model::{self, Model};
use serde_json::{Map, Value, json};

pub fn run(arguments: &InspectArgs) -> anyhow::Result<()> {
    let mut facts = Map::new();
    let config = match &arguments.adapter {
        Some(folder) => {
            let config = AdapterConfig::read(folder)?;
            facts.insert("adapter".into(), describe_adapter(&config));
            config
        }
        None => peft_config(&arguments.lora),
    };
    if let Some(path) = &arguments.model {
        let checkpoint = Checkpoint::open(path)?;
        let (family, decoder) = families::read_config(checkpoint.config())?;
        let modules = model::modules(family, &decoder);
        if let Some(folder) = &arguments.adapter {
            Adapter::read(folder, &modules, &Device::cpu())?;
        }
        let mut parameters = 0u64;
        for name in checkpoint.tensor_names() {
            parameters += checkpoint
                .info(name)?
                .shape
                .iter()
                .map(|&n| n as u64)
                .product::<u64>();
        }
        facts.insert(
            "model".into(),
            json!({
                "family": family.model_type,
                "parameters": parameters,
                "layers": decoder.num_layers,
                "hidden_size": decoder.hidden_size,
                "intermediate_size": decoder.intermediate_size,
                "heads": decoder.num_heads,
                "kv_heads": decoder.num_kv_heads,
                "head_dim": decoder.head_dim,
                "vocab_size": decoder.vocab_size,
                "max_position_embeddings": decoder.max_position_embeddings,
                "tie_word_embeddings": decoder.tie_word_embeddings,
            }),
        );
        let targets = config.resolve(&modules)?;
        let whole = config.whole_parameter_count(&modules, &targets)?;
        let updates: u64 = targets.iter().map(|t| t.parameter_count() as u64).sum();
        let trained = updates + whole as u64;
        let on_cpu = match arguments.machine.device {
            DeviceArg::Cpu => true,
            DeviceArg::Cuda(_) | DeviceArg::Sim => false,
            DeviceArg::Auto => machine::open_device(DeviceArg::Auto)?.is_cpu(),
        };
        let dtype = DType::from(arguments.machine.dtype.unwrap_or(machine::USUAL_DTYPE));
        let activations = if on_cpu { DType::F32 } else { dtype };
        let nf4 = arguments.machine.nf4();
        let own_bases = config.init_lora_weights.replaces_base();
        let shape = TrainingShape {
            tokens: arguments.batch_size * arguments.max_seq_length,
            whole_parameters: whole,
            derived_bytes: config.derived_bytes(&modules, &targets, activations)?,
            weight_bytes: Model::weight_bytes_when_loaded(&checkpoint, dtype, nf4.as_ref())?,
            own_base_bytes: if own_bases { dtype.size_in_bytes() } else { 0 },
            activations,
            quantized: nf4.is_some() || checkpoint.nf4_source_dtype().is_some(),
            moments_in_8_bits: arguments.optim == OptimArg::Adamw8bit,
            gradient_checkpointing: arguments.gradient_checkpointing,
            on_cpu,
        };
        let estimate = MemoryEstimate::new(&decoder, &targets, shape);
        let memory = json!({
            "weights": estimate.weights,
            "adapter": estimate.adapter,
            "gradients": estimate.gradients,
            "optimizer": estimate.optimizer,
            "activations": estimate.activations,
            "workspace": estimate.workspace,
            "program": estimate.program,
            "total": estimate.total(),
        });
        if arguments.estimate {
            facts = Map::from_iter([("training".into(), json!({ "memory_bytes": memory }))]);
            return write_facts(&facts, arguments.json);
        }
        facts.insert(
            "training".into(),
            json!({
                "adapted_modules": targets.len(),
                "trained_parameters": trained,
                "trained_share": trained as f64 / (parameters + trained) as f64,
                "tokens_per_batch": shape.tokens,
                "memory_bytes": memory,
            }),
        );
    }
    write_facts(&facts, arguments.json)
}

fn write_facts(facts: &Map<String, Value>, as_json: bool) -> anyhow::Result<()> {
    let mut out = stdout().lock();
    if as_json {
        writeln!(out, "{}", Value::Object(facts.clone()))?;
    } else {
        for (section, fact) in facts {
            writeln!(out, "{section}")?;
            print(&mut out, fact, 2)?;
        }
    }
    Ok(())
}

fn describe_adapter(config: &AdapterConfig) -> Value {
    let all = config.to_json();
    let keys = [
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "target_modules",
        "init_lora_weights",
        "bias",
        "lora_bias",
        "modules_to_save",
        "trainable_token_indices",
        "rank_pattern",
        "alpha_pattern",
        "base_model_name_or_path",
    ];
    keys.iter()
        .filter_map(|&key| Some((key.to_owned(), all.get(key)?.clone())))
        .collect::<Map<_, _>>()
        .into()
}

fn print(out: &mut impl Write, fact: &Value, indent: usize) -> std::io::Result<()> {
    let Value::Object(entries) = fact else {
        return Ok(());
    };
    let width = 30 - indent;
    for (key, value) in entries {
        let name = key.replace('_', " ");
        match value {
            Value::Object(inner) if !inner.is_empty() => {
                writeln!(out, "{:indent$}{}", "", name.trim_end_matches(" bytes"))?;
                let readable = |(key, value): (&String, &Value)| {
                    let text = match value.as_f64() {
                        Some(bytes) if key != "r" => {
                            format!("{:.0} MiB", bytes / (1 << 20) as f64).into()
                        }
                        _ => value.clone(),
                    };
                    (key.clone(), text)
                };
                print(
                    out,
                    &inner.iter().map(readable).collect::<Map<_, _>>().into(),
                    indent + 2,
                )?;
            }
            Value::String(text) => writeln!(out, "{:indent$}{name:width$}{text}", "")?,
            Value::Number(share) if key.ends_with("share") => {
                writeln!(
                    out,
                    "{:indent$}{name:width$}{:.2} %",
                    "",
                    100.0 * share.as_f64().unwrap_or_default()
                )?;
            }
            other => writeln!(out, "{:indent$}{name:width$}{other}", "")?,
        }
    }
    Ok(())
}
