//! The command line: every command, flag and default is defined here and nowhere else.
//!
//! Flags are named as PEFT and the Transformers trainer name them; mlx-lm's names are aliases.

mod adapter;
mod config_file;
mod inspect;
mod model;
mod run;
mod train;
mod values;

use clap::{Args, Parser, Subcommand};

pub use adapter::{
    AdapterArgs, AdapterCommand, CombinationArg, CombineArgs, ConvertAdapterArgs, DiffArgs,
    FormatArg, ListArgs,
};
pub use config_file::parse;
pub use inspect::InspectArgs;
pub use model::{ConvertArgs, MergeArgs, QuantizeArgs};
pub use run::{EvalArgs, GenerateArgs, LogitsArgs};
pub use train::{LoraArgs, OptimizationArgs, TrainConfig};
pub use values::{
    AdapterArg, BiasArg, DeviceArg, DtypeArg, InitArg, OptimArg, QuantTypeArg, TokensArg,
};

use fuselora_transformer::quantize::Nf4Options;

use crate::data::FieldNames;

/// Fine-tune language models with LoRA.
#[derive(Debug, Parser)]
#[command(
    name = "fuselora",
    version,
    disable_help_flag = true,
    disable_help_subcommand = true,
    subcommand_required = true
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Print help
    // The short form, one line a flag, whether asked by -h or --help.
    #[arg(short, long, global = true, action = clap::ArgAction::HelpShort)]
    help: Option<bool>,
    /// Print help with the rarer flags too
    // Answered by `parse`, before clap misses flags that are required.
    #[arg(long, global = true)]
    help_all: bool,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a LoRA adapter
    Train(Box<TrainConfig>),
    /// Loss and perplexity on held-out rows
    Eval(EvalArgs),
    /// Continue a prompt
    Generate(GenerateArgs),
    /// Fold an adapter into its base model
    Merge(MergeArgs),
    /// Turn a GGUF file into a Hugging Face checkpoint
    Convert(ConvertArgs),
    /// List, compare, combine and convert adapters
    Adapter(AdapterArgs),
    /// Write a model with its projections in 4 bits
    Quantize(QuantizeArgs),
    /// Write the logits of rows to a safetensors file
    Logits(LogitsArgs),
    /// Say what a model or an adapter is, and what training it takes
    Inspect(InspectArgs),
}

/// How rows are read.
#[derive(Clone, Debug, PartialEq, Args, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = "Data")]
pub struct RowArgs {
    /// Field that holds the prompt, in place of `prompt`
    #[arg(long, hide_short_help = true, value_name = "NAME")]
    pub prompt_field: Option<String>,
    /// Field that holds the completion
    #[arg(long, hide_short_help = true, value_name = "NAME")]
    pub completion_field: Option<String>,
    /// Learn completions only; `=false`: prompts too
    #[arg(long, alias = "completion-only-loss", value_name = "BOOL", hide_possible_values = true, action = clap::ArgAction::Set, default_value_t = true,
        default_missing_value = "true", num_args = 0..=1, require_equals = true)]
    pub mask_prompt: bool,
    /// Plain text even where the model has a chat template
    #[arg(long, hide_short_help = true, value_name = "BOOL", hide_possible_values = true, action = clap::ArgAction::Set, default_value_t = false,
        default_missing_value = "true", num_args = 0..=1, require_equals = true, hide_default_value = true)]
    pub no_chat_template: bool,
    /// Longer rows keep their beginning
    #[arg(long, alias = "max-length", value_name = "N", default_value_t = 2048, value_parser = values::count)]
    pub max_seq_length: usize,
}

impl RowArgs {
    /// The fields to read.
    pub fn field_names(&self) -> FieldNames {
        FieldNames {
            prompt: self.prompt_field.clone(),
            completion: self.completion_field.clone(),
            adapter: None,
        }
    }
}

/// Where and in which precision to compute.
#[derive(Clone, Debug, PartialEq, Args, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = "Machine")]
pub struct MachineArgs {
    /// cpu, cuda, cuda:1, sim, auto
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: DeviceArg,
    /// f32, bf16 or f16; without: f32
    #[arg(
        long,
        alias = "bnb-4bit-compute-dtype",
        value_name = "DTYPE",
        hide_possible_values = true,
        value_enum
    )]
    pub dtype: Option<DtypeArg>,
    /// Quantize the projections of a float model to NF4 as they are loaded
    #[arg(long, value_name = "BOOL", hide_possible_values = true, action = clap::ArgAction::Set, default_value_t = false,
        default_missing_value = "true", num_args = 0..=1, require_equals = true, hide_default_value = true)]
    pub load_in_4bit: bool,
    /// How.
    #[command(flatten)]
    #[serde(flatten)]
    pub nf4: Nf4Args,
}

/// How weights are quantized, as transformers' `BitsAndBytesConfig` describes it.
#[derive(Clone, Debug, PartialEq, Args, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Nf4Args {
    /// The only one
    #[arg(long, hide_short_help = true, value_name = "TYPE", value_enum, default_value_t = QuantTypeArg::Nf4)]
    pub bnb_4bit_quant_type: QuantTypeArg,
    /// Quantize the statistics too
    #[arg(long, hide_short_help = true, value_name = "BOOL", hide_possible_values = true, action = clap::ArgAction::Set, default_value_t = false,
        default_missing_value = "true", num_args = 0..=1, require_equals = true, hide_default_value = true)]
    pub bnb_4bit_use_double_quant: bool,
    /// Elements that share an absmax: a power of two from 32 to 4096
    #[arg(long, hide_short_help = true, value_name = "N", default_value_t = 64, value_parser = values::block_size)]
    pub bnb_4bit_blocksize: usize,
}

impl MachineArgs {
    /// How projections are quantized as they are loaded, where they are.
    pub fn nf4(&self) -> Option<Nf4Options> {
        self.load_in_4bit.then(|| self.nf4.options())
    }
}

impl Nf4Args {
    /// The same for the library.
    pub fn options(&self) -> Nf4Options {
        Nf4Options {
            block_size: self.bnb_4bit_blocksize,
            double_quant: self.bnb_4bit_use_double_quant,
        }
    }
}
