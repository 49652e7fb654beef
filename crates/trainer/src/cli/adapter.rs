//! The commands that make adapters of adapters: `adapter combine`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use fuselora_transformer::adapter::Combination;

use super::values::count;

/// `fuselora adapter`
#[derive(Clone, Debug, PartialEq, Args)]
#[command(disable_help_subcommand = true)]
pub struct AdapterArgs {
    /// What to do with adapters.
    #[command(subcommand)]
    pub command: AdapterCommand,
}

/// What is done with adapters.
#[derive(Clone, Debug, PartialEq, Subcommand)]
pub enum AdapterCommand {
    /// Make one adapter of several, each with a weight
    Combine(CombineArgs),
}

/// `fuselora adapter combine`
#[derive(Clone, Debug, PartialEq, Args)]
#[command(
    after_help = "Example:\n  fuselora adapter combine --model SmolLM2-135M-Instruct --adapter sql --adapter chat --weights 0.7,0.3 --output both"
)]
pub struct CombineArgs {
    /// Base model of all of them: a Hugging Face folder or a GGUF file
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,
    /// Adapter to take in; once for each
    #[arg(long, value_name = "DIR", required = true)]
    pub adapter: Vec<PathBuf>,
    /// The adapters' weights, in their order
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        required = true,
        allow_hyphen_values = true
    )]
    pub weights: Vec<f64>,
    /// PEFT's way of combining: linear, cat or svd
    #[arg(
        long,
        value_name = "NAME",
        value_enum,
        hide_possible_values = true,
        default_value = "svd"
    )]
    pub combination_type: CombinationArg,
    /// Rank of svd's result; without: the largest of the adapters
    #[arg(long, value_name = "N", value_parser = count)]
    pub svd_rank: Option<usize>,
    /// Folder for the new adapter
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
}

/// How updates become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum CombinationArg {
    /// A and B each summed.
    #[value(help = None::<&str>)]
    Linear,
    /// A and B side by side.
    #[value(help = None::<&str>)]
    Cat,
    /// The largest part of the sum.
    #[value(help = None::<&str>)]
    Svd,
}

impl CombineArgs {
    /// How the adapters are combined.
    pub fn combination(&self) -> Combination {
        match self.combination_type {
            CombinationArg::Linear => Combination::Linear,
            CombinationArg::Cat => Combination::Cat,
            CombinationArg::Svd => Combination::Svd(self.svd_rank),
        }
    }
}
