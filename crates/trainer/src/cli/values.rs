//! Values that flags take.

use std::path::{Path, PathBuf};
use std::{fmt, str::FromStr};

use fuselora_transformer::adapter::{InitLoraWeights, TrainedBiases, TrainedTokens};
use serde::{Serialize, Serializer};

/// An adapter, with a name of its own where there are several: `DIR` or `NAME=DIR`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterArg {
    /// The name.
    pub name: Option<String>,
    /// Where it lies.
    pub folder: PathBuf,
}

impl FromStr for AdapterArg {
    type Err = String;

    fn from_str(text: &str) -> Result<AdapterArg, String> {
        let (name, folder) = match text.split_once('=') {
            Some((name, folder)) if !Path::new(text).exists() => (Some(name.to_owned()), folder),
            _ => (None, text),
        };
        if name.as_ref().is_some_and(String::is_empty) {
            return Err("the name before = is empty".to_string());
        }
        Ok(AdapterArg {
            name,
            folder: folder.into(),
        })
    }
}

/// A device as named on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceArg {
    /// The processor.
    Cpu,
    /// The CUDA device with this index.
    Cuda(usize),
    /// A simulated GPU.
    Sim,
    /// The first CUDA device, or the processor where there is none.
    Auto,
}

impl FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<DeviceArg, String> {
        match text {
            "cpu" => Ok(DeviceArg::Cpu),
            "cuda" => Ok(DeviceArg::Cuda(0)),
            "sim" => Ok(DeviceArg::Sim),
            "auto" => Ok(DeviceArg::Auto),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|index| index.parse().ok())
                .map(DeviceArg::Cuda)
                .ok_or_else(|| "there are cpu, cuda, cuda:N, sim and auto".to_string()),
        }
    }
}

impl fmt::Display for DeviceArg {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        match self {
            DeviceArg::Cpu => formatter.write_str("cpu"),
            DeviceArg::Cuda(index) => write!(formatter, "cuda:{index}"),
            DeviceArg::Sim => formatter.write_str("sim"),
            DeviceArg::Auto => formatter.write_str("auto"),
        }
    }
}

impl Serialize for DeviceArg {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A floating-point type as named on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DtypeArg {
    /// 32 bits.
    #[value(alias = "float32", help = None::<&str>)]
    F32,
    /// 16 bits, 8 of them exponent.
    #[value(alias = "bfloat16", help = None::<&str>)]
    Bf16,
    /// 16 bits, 5 of them exponent.
    #[value(alias = "float16", help = None::<&str>)]
    F16,
}

/// An optimizer, as transformers' `optim` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum OptimArg {
    /// AdamW with moments in f32.
    #[value(alias = "adamw", help = None::<&str>)]
    AdamwTorch,
    /// AdamW with moments in 8 bits, as bitsandbytes keeps them.
    #[value(name = "adamw_8bit", alias = "adamw_bnb_8bit", help = None::<&str>)]
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
}

/// How fresh weights come about, as PEFT's `init_lora_weights` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitArg(pub InitLoraWeights);

impl FromStr for InitArg {
    type Err = String;

    fn from_str(text: &str) -> Result<InitArg, String> {
        InitLoraWeights::from_name(text)
            .map(InitArg)
            .ok_or_else(|| {
                "there are true, false, gaussian, orthogonal, pissa, pissa_niter_N, olora and loftq"
                    .to_string()
            })
    }
}

impl fmt::Display for InitArg {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

impl Serialize for InitArg {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A data type of 4 bits, as bitsandbytes names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum QuantTypeArg {
    /// NormalFloat.
    #[value(help = None::<&str>)]
    Nf4,
}

/// Which biases are trained, as PEFT's `bias` names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum BiasArg {
    /// None.
    #[value(help = None::<&str>)]
    None,
    /// Every one.
    #[value(help = None::<&str>)]
    All,
    /// Those of adapted modules.
    #[value(help = None::<&str>)]
    LoraOnly,
}

impl From<BiasArg> for TrainedBiases {
    fn from(bias: BiasArg) -> TrainedBiases {
        match bias {
            BiasArg::None => TrainedBiases::None,
            BiasArg::All => TrainedBiases::All,
            BiasArg::LoraOnly => TrainedBiases::LoraOnly,
        }
    }
}

/// Tokens whose rows are trained: `5,7`, or `embed_tokens=5,7;lm_head=7`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokensArg(pub TrainedTokens);

impl FromStr for TokensArg {
    type Err = String;

    fn from_str(text: &str) -> Result<TokensArg, String> {
        let wrong =
            || "it must be token ids such as 5,7, or embed_tokens=5,7;lm_head=7".to_string();
        let ids = |text: &str| -> Result<Vec<u32>, String> {
            let ids = text
                .split(',')
                .map(|id| id.trim().parse().map_err(|_| wrong()));
            ids.collect()
        };
        if !text.contains('=') {
            return Ok(TokensArg(TrainedTokens::Embedding(ids(text)?)));
        }
        let of_module = |part: &str| {
            let (module, list) = part.split_once('=').ok_or_else(wrong)?;
            Ok((module.trim().to_owned(), ids(list)?))
        };
        let all = text
            .split(';')
            .map(of_module)
            .collect::<Result<_, String>>()?;
        Ok(TokensArg(TrainedTokens::ByModule(all)))
    }
}

impl fmt::Display for TokensArg {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        let list = |ids: &[u32]| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        match &self.0 {
            TrainedTokens::None => Ok(()),
            TrainedTokens::Embedding(ids) => formatter.write_str(&list(ids)),
            TrainedTokens::ByModule(all) => {
                let all = all
                    .iter()
                    .map(|(module, ids)| format!("{module}={}", list(ids)));
                formatter.write_str(&all.collect::<Vec<_>>().join(";"))
            }
        }
    }
}

impl Serialize for TokensArg {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A probability or share: 0 to below 1.
pub(super) fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if (0.0..1.0).contains(&value) => Ok(value),
        _ => Err("it must be a number from 0 to below 1".to_string()),
    }
}

/// A finite number above 0.
pub(super) fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value.is_finite() => Ok(value),
        _ => Err("it must be a number above 0".to_string()),
    }
}

/// A finite number that is 0 or more.
pub(super) fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value >= 0.0 && value.is_finite() => Ok(value),
        _ => Err("it must be 0 or more".to_string()),
    }
}

/// A count of at least 1.
pub(super) fn count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(value) if value > 0 => Ok(value),
        _ => Err("it must be a whole number, 1 or more".to_string()),
    }
}

/// A number of steps of at least 1.
pub(super) fn steps(text: &str) -> Result<u64, String> {
    count(text).map(|value| value as u64)
}

impl From<DtypeArg> for fuselora_tensor::DType {
    fn from(dtype: DtypeArg) -> fuselora_tensor::DType {
        match dtype {
            DtypeArg::F32 => fuselora_tensor::DType::F32,
            DtypeArg::Bf16 => fuselora_tensor::DType::BF16,
            DtypeArg::F16 => fuselora_tensor::DType::F16,
        }
    }
}

/// A block of a quantized weight.
pub(super) fn block_size(text: &str) -> Result<usize, String> {
    let wrong = || "it must be a power of two from 32 to 4096".to_string();
    let size = text.parse().map_err(|_| wrong())?;
    fuselora_tensor::nf4::check_block_size(size).map_err(|_| wrong())?;
    Ok(size)
}
