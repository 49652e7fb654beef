//! The commands about adapters: `adapter list`, `combine`, `convert` and `diff`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use fuselora_transformer::adapter::{AdapterFormat, Combination};

use super::{DtypeArg, values::count};

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
    /// Say what adapters there are
    List(ListArgs),
    /// Make one adapter of several, each with a weight
    Combine(CombineArgs),
    /// Write an adapter in the format of another program
    Convert(ConvertAdapterArgs),
    /// Say how far two adapters are from each other
    Diff(DiffArgs),
}

/// `fuselora adapter list`
#[derive(Clone, Debug, PartialEq, Args)]
#[command(after_help = "Example:\n  fuselora adapter list adapters")]
pub struct ListArgs {
    /// Adapters, or folders of adapters: of PEFT, of mlx-lm, GGUF files
    #[arg(value_name = "PATH", required = true)]
    pub paths: Vec<PathBuf>,
    /// Print one JSON array
    #[arg(long)]
    pub json: bool,
}

/// `fuselora adapter convert`
#[derive(Clone, Debug, PartialEq, Args)]
#[command(
    after_help = "Example:\n  fuselora adapter convert --model SmolLM2-135M-Instruct --adapter sql --to gguf --output sql.gguf"
)]
pub struct ConvertAdapterArgs {
    /// Base model of the adapter: a Hugging Face folder or a GGUF file
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,
    /// Adapter in any of the formats: a folder of PEFT or mlx-lm, or a GGUF file
    #[arg(long, value_name = "PATH")]
    pub adapter: PathBuf,
    /// peft; gguf, for llama.cpp; mlx, for mlx-lm
    #[arg(long, value_name = "FORMAT", value_enum, hide_possible_values = true)]
    pub to: FormatArg,
    /// File of gguf, or folder of peft and mlx
    #[arg(long, value_name = "PATH")]
    pub output: PathBuf,
    /// Precision of a GGUF file; the others are f32
    #[arg(long, value_name = "DTYPE", value_enum, default_value_t = DtypeArg::F32)]
    pub dtype: DtypeArg,
}

/// A format of adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum FormatArg {
    /// PEFT's folder.
    #[value(help = None::<&str>)]
    Peft,
    /// llama.cpp's file.
    #[value(help = None::<&str>)]
    Gguf,
    /// mlx-lm's folder.
    #[value(help = None::<&str>)]
    Mlx,
}

impl From<FormatArg> for AdapterFormat {
    fn from(format: FormatArg) -> AdapterFormat {
        match format {
            FormatArg::Peft => AdapterFormat::Peft,
            FormatArg::Gguf => AdapterFormat::Gguf,
            FormatArg::Mlx => AdapterFormat::Mlx,
        }
    }
}

/// `fuselora adapter diff`
#[derive(Clone, Debug, PartialEq, Args)]
#[command(
    after_help = "Example:\n  fuselora adapter diff --model SmolLM2-135M-Instruct sql sql-longer"
)]
pub struct DiffArgs {
    /// Base model of both: a Hugging Face folder or a GGUF file
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,
    /// Adapter in any of the formats
    #[arg(value_name = "FIRST")]
    pub first: PathBuf,
    /// The one to compare it with
    #[arg(value_name = "SECOND")]
    pub second: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
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
