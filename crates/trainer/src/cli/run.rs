//! The commands that run a model: `eval`, `generate`, `logits`.

use std::path::PathBuf;

use clap::Args;

use super::{
    AdapterArg, MachineArgs, RowArgs,
    values::{count, not_negative, positive},
};

/// `fuselora eval`
#[derive(Clone, Debug, PartialEq, Args)]
#[command(
    next_help_heading = "Files",
    after_help = "Example:\n  fuselora eval --model SmolLM2-135M-Instruct --adapter adapter --data sql/test.jsonl"
)]
pub struct EvalArgs {
    /// Base model: a Hugging Face folder or a GGUF file
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,
    /// Adapter on top of it; several as NAME=DIR, of which each row names its own
    #[arg(long, value_name = "DIR")]
    pub adapter: Vec<AdapterArg>,
    /// JSONL rows, or a folder with test.jsonl
    #[arg(long, value_name = "PATH")]
    pub data: PathBuf,
    /// Field that names a row's adapter
    #[arg(
        long,
        hide_short_help = true,
        value_name = "NAME",
        default_value = "adapter"
    )]
    pub adapter_field: String,
    /// Rows per forward pass
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = count)]
    pub batch_size: usize,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// How rows are read.
    #[command(flatten)]
    pub rows: RowArgs,
    /// Where and in which precision to compute.
    #[command(flatten)]
    pub machine: MachineArgs,
}

/// `fuselora generate`
#[derive(Clone, Debug, PartialEq, Args)]
#[command(
    next_help_heading = "Files",
    after_help = "Example:\n  fuselora generate --model SmolLM2-135M-Instruct --adapter adapter --prompt 'What is the capital of France?'"
)]
pub struct GenerateArgs {
    /// Base model: a Hugging Face folder or a GGUF file
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,
    /// Adapter on top of it; several as NAME=DIR
    #[arg(long, value_name = "DIR")]
    pub adapter: Vec<AdapterArg>,
    /// Which of several answers --prompt
    #[arg(long, value_name = "NAME")]
    pub adapter_name: Option<String>,
    /// Text to continue; a user's turn where the model has a chat template
    #[arg(
        long,
        help_heading = "Prompt",
        value_name = "TEXT",
        required_unless_present_any = ["prompt_ids", "prompts"],
        conflicts_with_all = ["prompt_ids", "prompts"]
    )]
    pub prompt: Option<String>,
    /// JSONL of `prompt` or `prompt_ids`, and `adapter`: all answered at once, a JSON object each
    #[arg(long, help_heading = "Prompt", value_name = "FILE", conflicts_with_all = ["prompt_ids", "adapter_name"])]
    pub prompts: Option<PathBuf>,
    /// The same as token ids, such as 1,2,3
    #[arg(
        long,
        help_heading = "Prompt",
        value_name = "IDS",
        value_delimiter = ','
    )]
    pub prompt_ids: Option<Vec<u32>>,
    /// System message before the prompt
    #[arg(long, alias = "system-prompt", help_heading = "Prompt", value_name = "TEXT", conflicts_with_all = ["prompt_ids", "no_chat_template"])]
    pub system: Option<String>,
    /// Plain text even where the model has a chat template
    #[arg(long, help_heading = "Prompt")]
    pub no_chat_template: bool,
    /// Stop after so many tokens
    #[arg(long, alias = "max-tokens", help_heading = "Sampling", value_name = "N", default_value_t = 256, value_parser = count)]
    pub max_new_tokens: usize,
    /// 0: always the likeliest token
    #[arg(long, alias = "temp", help_heading = "Sampling", value_name = "F", default_value_t = 0.7, value_parser = not_negative)]
    pub temperature: f64,
    /// Sample among the likeliest tokens of this total probability
    #[arg(long, help_heading = "Sampling", value_name = "F", default_value_t = 0.95, value_parser = top_p)]
    pub top_p: f64,
    /// Of sampling
    #[arg(
        long,
        help_heading = "Sampling",
        value_name = "N",
        default_value_t = 42
    )]
    pub seed: u64,
    /// Go on after the end-of-sequence token
    #[arg(long, help_heading = "Sampling")]
    pub ignore_eos: bool,
    /// Print one JSON object with `tokens` (prompt and continuation) instead of streaming text
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    /// Where and in which precision to compute.
    #[command(flatten)]
    pub machine: MachineArgs,
}

fn top_p(text: &str) -> Result<f64, String> {
    match positive(text) {
        Ok(value) if value <= 1.0 => Ok(value),
        _ => Err("it must be a number above 0 and at most 1".to_string()),
    }
}

/// `fuselora logits`
#[derive(Clone, Debug, PartialEq, Args)]
#[command(
    next_help_heading = "Files",
    after_help = "Example:\n  fuselora logits --model llama --data rows.jsonl --rows 2 --output logits.safetensors\n\n\
                  The file holds `row.0`, `row.1`, ...: [tokens, vocab], f32."
)]
pub struct LogitsArgs {
    /// Base model: a Hugging Face folder or a GGUF file
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,
    /// Adapter on top of it
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// JSONL rows, or a folder with test.jsonl
    #[arg(long, value_name = "PATH")]
    pub data: PathBuf,
    /// Safetensors file to write
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
    /// How many rows, from the first
    #[arg(long = "rows", value_name = "N", default_value_t = 1, value_parser = count)]
    pub row_count: usize,
    /// How rows are read.
    #[command(flatten)]
    pub rows: RowArgs,
    /// Where and in which precision to compute.
    #[command(flatten)]
    pub machine: MachineArgs,
}
