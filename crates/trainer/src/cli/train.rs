//! `fuselora train`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use super::{
    MachineArgs, RowArgs,
    values::{BiasArg, InitArg, OptimArg, TokensArg, count, not_negative, positive, share, steps},
};
use crate::{
    mistake,
    schedule::{LrScheduler, Schedule, warmup_steps},
};

/// Everything that determines a training run, as given by flags or a configuration file.
///
/// Its TOML form, [`TrainConfig::to_toml`], is a configuration file that repeats the run.
#[derive(Clone, Debug, PartialEq, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(
    args_override_self = true,
    next_help_heading = "Files",
    after_help = "Example:\n  fuselora train --model SmolLM2-135M-Instruct --data sql/ --output adapter --rank 8 --steps 200"
)]
pub struct TrainConfig {
    /// Base model: a Hugging Face folder or a GGUF file
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// JSONL rows, or a folder with train.jsonl and valid.jsonl
    #[arg(long, alias = "train-data", value_name = "PATH")]
    pub data: Option<PathBuf>,
    /// Held-out rows, in place of the folder's valid.jsonl
    #[arg(long, hide_short_help = true, value_name = "PATH")]
    pub eval_data: Option<PathBuf>,
    /// Folder for the adapter and the records of the run
    #[arg(long, aliases = ["output-dir", "adapter-path"], value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// Adapter to start from, in place of a new one
    #[arg(long, hide_short_help = true, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Continue from the last checkpoint in the output folder
    #[arg(long, value_name = "BOOL", hide_possible_values = true, action = clap::ArgAction::Set, default_value_t = false,
        default_missing_value = "true", num_args = 0..=1, require_equals = true, hide_default_value = true)]
    #[serde(skip)]
    pub resume: bool,
    /// TOML file with flags as keys; flags given here win
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// How rows are read.
    #[command(flatten)]
    #[serde(flatten)]
    pub rows: RowArgs,
    /// The adapter.
    #[command(flatten)]
    #[serde(flatten)]
    pub lora: LoraArgs,
    /// Optimizer, schedule and order.
    #[command(flatten)]
    #[serde(flatten)]
    pub optimization: OptimizationArgs,
    /// What happens every so many steps.
    #[command(flatten)]
    #[serde(flatten)]
    pub intervals: IntervalArgs,
    /// Recompute blocks in backward: less memory, more time
    #[arg(long, help_heading = "Machine", alias = "grad-checkpoint", value_name = "BOOL", hide_possible_values = true, action = clap::ArgAction::Set, default_value_t = false,
        default_missing_value = "true", num_args = 0..=1, require_equals = true, hide_default_value = true)]
    pub gradient_checkpointing: bool,
    /// Where and in which precision to compute.
    #[command(flatten)]
    #[serde(flatten)]
    pub machine: MachineArgs,
}

/// A LoRA adapter, as PEFT's `LoraConfig` describes it.
#[derive(Clone, Debug, PartialEq, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = "LoRA")]
pub struct LoraArgs {
    /// Rank of the update
    #[arg(long, aliases = ["r", "lora-r"], value_name = "N", default_value_t = 8, value_parser = count)]
    pub rank: usize,
    /// The update is scaled by alpha / rank
    #[arg(long, alias = "alpha", value_name = "F", default_value_t = 16.0, value_parser = positive)]
    pub lora_alpha: f64,
    /// Dropout on the update's input
    #[arg(long, alias = "dropout", value_name = "F", default_value_t = 0.0, value_parser = share)]
    pub lora_dropout: f64,
    /// Scale by alpha / sqrt(rank) instead
    #[arg(long, hide_short_help = true, value_name = "BOOL", hide_possible_values = true, action = clap::ArgAction::Set, default_value_t = false,
        default_missing_value = "true", num_args = 0..=1, require_equals = true, hide_default_value = true)]
    pub use_rslora: bool,
    /// Train magnitude and direction apart (DoRA)
    #[arg(long, hide_short_help = true, value_name = "BOOL", hide_possible_values = true, action = clap::ArgAction::Set, default_value_t = false,
        default_missing_value = "true", num_args = 0..=1, require_equals = true, hide_default_value = true)]
    pub use_dora: bool,
    /// all-linear, names such as q_proj,v_proj, or a regex
    #[arg(long, value_name = "NAMES", default_value = "all-linear")]
    pub target_modules: String,
    /// Or false, gaussian, orthogonal, olora, loftq, pissa(_niter_N)
    #[arg(
        long,
        hide_short_help = true,
        value_name = "NAME",
        default_value = "true"
    )]
    pub init_lora_weights: InitArg,
    /// Quantizations of LoftQ
    #[arg(long, hide_short_help = true, value_name = "N", default_value_t = 1, value_parser = count)]
    pub loftq_iter: usize,
    /// Biases to train: none, all, or lora_only, those of targets
    #[arg(long, hide_short_help = true, value_name = "WHICH", hide_possible_values = true, value_enum, default_value_t = BiasArg::None)]
    pub bias: BiasArg,
    /// Give lora_B a bias
    #[arg(long, hide_short_help = true, value_name = "BOOL", hide_possible_values = true, action = clap::ArgAction::Set, default_value_t = false,
        default_missing_value = "true", num_args = 0..=1, require_equals = true, hide_default_value = true)]
    pub lora_bias: bool,
    /// Modules to train whole, such as lm_head,embed_tokens
    #[arg(long, hide_short_help = true, value_name = "NAMES")]
    pub modules_to_save: Option<String>,
    /// Embedding rows to train: 5,7 or embed_tokens=5,7;lm_head=7
    #[arg(long, hide_short_help = true, value_name = "IDS")]
    pub trainable_token_indices: Option<TokensArg>,
}

/// AdamW, its schedule, and the order of rows.
#[derive(Clone, Debug, PartialEq, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = "Optimization")]
pub struct OptimizationArgs {
    /// Optimizer steps, in place of epochs
    #[arg(long, aliases = ["max-steps", "iters"], value_name = "N", value_parser = steps)]
    pub steps: Option<u64>,
    /// Passes over the data
    #[arg(long, alias = "epochs", value_name = "F", default_value_t = 1.0, value_parser = positive)]
    pub num_train_epochs: f64,
    /// Rows per forward pass
    #[arg(long, alias = "per-device-train-batch-size", value_name = "N", default_value_t = 4, value_parser = count)]
    pub batch_size: usize,
    /// Batches per optimizer step
    #[arg(long, alias = "grad-accumulation-steps", value_name = "N", default_value_t = 1, value_parser = count)]
    pub gradient_accumulation_steps: usize,
    /// Peak learning rate
    #[arg(long, value_name = "F", default_value_t = 2e-4, value_parser = positive)]
    pub learning_rate: f64,
    /// constant, linear or cosine, after warm-up
    #[arg(long, alias = "lr-scheduler-type", value_name = "NAME", hide_possible_values = true, value_enum, default_value_t = LrScheduler::Linear)]
    pub lr_scheduler: LrScheduler,
    /// Steps of linear warm-up
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub warmup_steps: u64,
    /// The same as a share of all steps
    #[arg(long, hide_short_help = true, value_name = "F", default_value_t = 0.0, value_parser = share)]
    pub warmup_ratio: f64,
    /// adamw_torch, or adamw_8bit: its moments in 8 bits
    #[arg(long, hide_short_help = true, value_name = "NAME", hide_possible_values = true, value_enum, default_value_t = OptimArg::AdamwTorch)]
    pub optim: OptimArg,
    /// Gradients are clipped to this norm; 0: not
    #[arg(long, hide_short_help = true, value_name = "F", default_value_t = 1.0, value_parser = not_negative)]
    pub max_grad_norm: f64,
    /// LoRA+: B, magnitudes, biases and norms learn by so much times the rate
    #[arg(long, hide_short_help = true, value_name = "F", value_parser = positive)]
    pub loraplus_lr_ratio: Option<f64>,
    /// LoRA+: the rate of embeddings' updates
    #[arg(long, hide_short_help = true, value_name = "F", default_value_t = 1e-6, value_parser = positive)]
    pub loraplus_lr_embedding: f64,
    /// AdamW's decoupled weight decay
    #[arg(long, hide_short_help = true, value_name = "F", default_value_t = 0.0, value_parser = not_negative)]
    pub weight_decay: f64,
    /// AdamW's beta1
    #[arg(long, hide_short_help = true, value_name = "F", default_value_t = 0.9, value_parser = share)]
    pub adam_beta1: f64,
    /// AdamW's beta2
    #[arg(long, hide_short_help = true, value_name = "F", default_value_t = 0.999, value_parser = share)]
    pub adam_beta2: f64,
    /// AdamW's epsilon
    #[arg(long, hide_short_help = true, value_name = "F", default_value_t = 1e-8, value_parser = positive)]
    pub adam_epsilon: f64,
    /// Rows in file order
    #[arg(long, hide_short_help = true, value_name = "BOOL", hide_possible_values = true, action = clap::ArgAction::Set, default_value_t = false,
        default_missing_value = "true", num_args = 0..=1, require_equals = true, hide_default_value = true)]
    pub no_shuffle: bool,
    /// Of order, initialization and dropout
    #[arg(long, hide_short_help = true, value_name = "N", default_value_t = 42, value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    pub seed: u64,
}

/// What happens every so many optimizer steps.
#[derive(Clone, Debug, PartialEq, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = "Records")]
pub struct IntervalArgs {
    /// Evaluate every N steps; without: before and after
    #[arg(long, alias = "steps-per-eval", value_name = "N", value_parser = steps)]
    pub eval_steps: Option<u64>,
    /// Save a checkpoint every N steps; without: at the end
    #[arg(long, alias = "save-every", value_name = "N", value_parser = steps)]
    pub save_steps: Option<u64>,
    /// Print a line every N steps where there is no terminal
    #[arg(long, hide_short_help = true, alias = "steps-per-report", value_name = "N", default_value_t = 10, value_parser = steps)]
    pub logging_steps: u64,
    /// Held-out prompts answered before and after, for the report
    #[arg(long, hide_short_help = true, value_name = "N", default_value_t = 2)]
    pub sample_answers: usize,
}

impl TrainConfig {
    /// The base model.
    ///
    /// # Errors
    /// A [`mistake::Mistake`] where neither flags nor file name it; so for the next two.
    pub fn model(&self) -> anyhow::Result<&Path> {
        given(self.model.as_deref(), "model", "the base model")
    }

    /// The training data.
    ///
    /// # Errors
    /// As [`TrainConfig::model`].
    pub fn data(&self) -> anyhow::Result<&Path> {
        given(self.data.as_deref(), "data", "the training data")
    }

    /// The folder to write.
    ///
    /// # Errors
    /// As [`TrainConfig::model`].
    pub fn output(&self) -> anyhow::Result<&Path> {
        given(
            self.output.as_deref(),
            "output",
            "the folder for the adapter",
        )
    }

    /// Checks what no single flag can: that everything needed is there and fits together.
    ///
    /// # Errors
    /// A [`mistake::Mistake`] that says what to change.
    pub fn validate(&self) -> anyhow::Result<()> {
        self.model()?;
        self.data()?;
        self.output()?;
        let warmup = self.optimization.warmup_steps;
        if warmup > 0 && self.optimization.warmup_ratio > 0.0 {
            return Err(mistake!("give --warmup-steps or --warmup-ratio, not both"));
        }
        if self.optimization.steps.is_some_and(|steps| warmup >= steps) {
            return Err(mistake!(
                "--warmup-steps {warmup} leaves nothing of the run: it must be below the number of steps"
            ));
        }
        Ok(())
    }

    /// Optimizer steps of the run, when the data takes `steps_per_epoch`.
    pub fn total_steps(&self, steps_per_epoch: u64) -> u64 {
        let by_epochs = (self.optimization.num_train_epochs * steps_per_epoch as f64).ceil() as u64;
        self.optimization.steps.unwrap_or(by_epochs)
    }

    /// The learning rates of a run of `total_steps`.
    pub fn schedule(&self, total_steps: u64) -> Schedule {
        let optimization = &self.optimization;
        Schedule {
            scheduler: optimization.lr_scheduler,
            peak: optimization.learning_rate,
            warmup_steps: warmup_steps(
                optimization.warmup_steps,
                optimization.warmup_ratio,
                total_steps,
            ),
            total_steps,
        }
    }

    /// The seed that rows are shuffled with; none keeps file order.
    pub fn shuffle_seed(&self) -> Option<u64> {
        (!self.optimization.no_shuffle).then_some(self.optimization.seed)
    }

    /// The configuration file that repeats this run: for `run.toml` in the output folder.
    ///
    /// # Errors
    /// Where a path is not UTF-8, which TOML cannot hold.
    pub fn to_toml(&self) -> anyhow::Result<String> {
        toml::to_string(self).context("the configuration cannot be written as TOML")
    }

    /// Every setting with its value as text, for the report.
    ///
    /// # Errors
    /// As [`TrainConfig::to_toml`].
    pub fn settings(&self) -> anyhow::Result<Vec<(String, String)>> {
        let table: toml::Table = toml::from_str(&self.to_toml()?)?;
        let text = |value: toml::Value| {
            value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_string)
        };
        Ok(table
            .into_iter()
            .map(|(name, value)| (name, text(value)))
            .collect())
    }
}

fn given<'a>(path: Option<&'a Path>, flag: &str, what: &str) -> anyhow::Result<&'a Path> {
    path.ok_or_else(|| {
        mistake!("say what {what} is: --{flag} PATH, or `{flag}` in the file given by --config")
    })
}
