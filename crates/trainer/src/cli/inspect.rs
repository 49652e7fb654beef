//! `fuselora inspect`.

use std::path::PathBuf;

use clap::Args;

use super::{LoraArgs, MachineArgs, OptimArg, values::count};

/// `fuselora inspect`
#[derive(Clone, Debug, PartialEq, Args)]
#[command(
    next_help_heading = "Files",
    after_help = "Example:\n  fuselora inspect --estimate --model SmolLM2-135M-Instruct --rank 16 --batch-size 4 --max-seq-length 512"
)]
pub struct InspectArgs {
    /// Base model: a Hugging Face folder or a GGUF file
    #[arg(long, value_name = "PATH", required_unless_present = "adapter")]
    pub model: Option<PathBuf>,
    /// Adapter, alone or on top of the model
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Print the memory that training takes, and nothing else
    #[arg(long, requires = "model")]
    pub estimate: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// The adapter whose training is estimated.
    #[command(flatten)]
    pub lora: LoraArgs,
    /// Rows per forward pass
    #[arg(long, help_heading = "Training", value_name = "N", default_value_t = 4, value_parser = count)]
    pub batch_size: usize,
    /// Tokens per row
    #[arg(long, help_heading = "Training", value_name = "N", default_value_t = 2048, value_parser = count)]
    pub max_seq_length: usize,
    /// Each block recomputed in backward
    #[arg(long, help_heading = "Training", alias = "grad-checkpoint")]
    pub gradient_checkpointing: bool,
    /// adamw_torch, or adamw_8bit: its moments in 8 bits
    #[arg(long, help_heading = "Training", value_name = "NAME", hide_possible_values = true, value_enum, default_value_t = OptimArg::AdamwTorch)]
    pub optim: OptimArg,
    /// Where training would run; a cuda device need not be there.
    #[command(flatten)]
    pub machine: MachineArgs,
}
