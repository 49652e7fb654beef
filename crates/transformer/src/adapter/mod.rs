//! LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

mod config;
mod files;
mod init;
mod target;

use std::collections::BTreeMap;

use fuselora_tensor::{DType, Device, Tensor};

pub(crate) use files::write;

pub use config::{AdapterConfig, InitLoraWeights, ModuleSelector};
pub use target::{LinearModule, Target};

use crate::error::Result;

/// A LoRA adapter: for each adapted linear module, a low-rank update of its weight.
pub struct Adapter {
    /// How it was made.
    pub config: AdapterConfig,
    /// The update of each module, by the module's path, such as `model.layers.0.self_attn.q_proj`.
    pub modules: BTreeMap<String, LoraWeights>,
}

/// The low-rank update `scaling * B * A` of one module's weight `[out_features, in_features]`.
pub struct LoraWeights {
    /// `lora_A`, `[rank, in_features]`, f32.
    pub a: Tensor,
    /// `lora_B`, `[out_features, rank]`, f32.
    pub b: Tensor,
    /// `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
    pub scaling: f32,
    /// Columns of B, rows of A.
    pub rank: usize,
}

impl Adapter {
    /// A fresh adapter on a model with these linear modules, initialised as the configuration says.
    ///
    /// Each module draws from a random stream of its own, so its values depend on `seed` and its name alone.
    ///
    /// # Errors
    /// When a target matches no module, or the device has no room.
    pub fn new(
        config: AdapterConfig,
        linear: &[LinearModule],
        device: &Device,
        seed: u64,
    ) -> Result<Adapter> {
        let mut modules = BTreeMap::new();
        for target in config.resolve(linear)? {
            let (a, b) = init::weights(config.init_lora_weights, &target, seed);
            let a = Tensor::from_f32(device, [target.rank, target.in_features], &a)?;
            let b = Tensor::from_f32(device, [target.out_features, target.rank], &b)?;
            modules.insert(
                target.module,
                LoraWeights {
                    a,
                    b,
                    scaling: target.scaling,
                    rank: target.rank,
                },
            );
        }
        Ok(Adapter { config, modules })
    }

    /// The number of trainable values.
    pub fn parameter_count(&self) -> usize {
        self.modules
            .values()
            .map(|lora| lora.a.element_count() + lora.b.element_count())
            .sum()
    }
}

/// The data type of adapters in files, and here.
const DTYPE: DType = DType::F32;
