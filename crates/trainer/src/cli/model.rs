//! The commands that write checkpoints: `merge`, `convert` and `quantize`.

use std::path::PathBuf;

use clap::Args;

use super::{DeviceArg, DtypeArg, Nf4Args, RowArgs};

/// `fuselora merge`
#[derive(Clone, Debug, PartialEq, Args)]
#[command(
    after_help = "Example:\n  fuselora merge --model SmolLM2-135M-Instruct --adapter adapter --output merged"
)]
pub struct MergeArgs {
    /// Base model: a Hugging Face folder or a GGUF file
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,
    /// Adapter to fold in
    #[arg(long, value_name = "DIR")]
    pub adapter: PathBuf,
    /// Folder for the Hugging Face checkpoint, tokenizer included
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Stored precision; without: as the base, or 16 bits
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeArg>,
    /// Quantize merged weights again where the base is in NF4, and say what that changes
    #[arg(long, conflicts_with = "dtype")]
    pub requantize: bool,
    /// JSONL rows, or a folder with test.jsonl, whose loss is compared before and after
    #[arg(
        long,
        help_heading = "Data",
        value_name = "PATH",
        requires = "requantize"
    )]
    pub data: Option<PathBuf>,
    /// Where to compute: cpu, cuda, cuda:1, sim, auto
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: DeviceArg,
    /// How rows are read.
    #[command(flatten)]
    pub rows: RowArgs,
}

/// `fuselora convert`
#[derive(Clone, Debug, PartialEq, Args)]
#[command(
    after_help = "Example:\n  fuselora convert --model SmolLM2-135M-Instruct.Q4_1.gguf --output SmolLM2-135M-Instruct --dtype bf16"
)]
pub struct ConvertArgs {
    /// GGUF file
    #[arg(long, value_name = "FILE")]
    pub model: PathBuf,
    /// Folder for the Hugging Face checkpoint, tokenizer and chat template included
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Stored precision
    #[arg(long, value_enum, default_value_t = DtypeArg::F32)]
    pub dtype: DtypeArg,
}

/// `fuselora quantize`
#[derive(Clone, Debug, PartialEq, Args)]
#[command(
    after_help = "Example:\n  fuselora quantize --model SmolLM2-135M-Instruct --output SmolLM2-135M-Instruct-bnb-4bit --bnb-4bit-use-double-quant"
)]
pub struct QuantizeArgs {
    /// Base model: a Hugging Face folder or a GGUF file
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,
    /// Folder for the checkpoint, in the layout of transformers and bitsandbytes
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Precision of what stays as it is; without: that of the base model
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeArg>,
    /// What transformers is to compute in
    #[arg(long, value_enum, default_value_t = DtypeArg::F32)]
    pub bnb_4bit_compute_dtype: DtypeArg,
    /// How.
    #[command(flatten)]
    pub nf4: Nf4Args,
}
