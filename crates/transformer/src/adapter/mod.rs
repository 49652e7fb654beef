//! LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

mod config;
mod files;
mod init;
mod target;

use std::collections::BTreeMap;
use std::sync::Arc;

use fuselora_tensor::ops::dora;
use fuselora_tensor::{DType, Device, Tensor, Weight};

pub(crate) use files::write;

pub use config::{AdapterConfig, InitLoraWeights, ModuleSelector};
pub use target::{LinearModule, Target};

use crate::error::{Error, Result};

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
    /// DoRA's `lora_magnitude_vector`, `[out_features]`, f32.
    pub magnitude: Option<Tensor>,
}

impl LoraWeights {
    /// Every tensor, in a fixed order.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        [&self.a, &self.b].into_iter().chain(&self.magnitude)
    }

    /// The same, to change.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        [&mut self.a, &mut self.b]
            .into_iter()
            .chain(&mut self.magnitude)
    }

    /// Every tensor with its name in PEFT's file, for the module at this path.
    pub fn named_tensors(&self, module: &str) -> impl Iterator<Item = (String, &Tensor)> {
        let names = files::PARTS.map(|part| files::tensor_name(module, part));
        names.into_iter().zip(self.tensors())
    }

    /// Zeros in the same shapes.
    pub(crate) fn zeros(&self) -> Result<LoraWeights> {
        let zeros = |t: &Tensor| Tensor::zeros(t.device(), t.shape(), DTYPE);
        Ok(LoraWeights {
            a: zeros(&self.a)?,
            b: zeros(&self.b)?,
            scaling: self.scaling,
            rank: self.rank,
            magnitude: self.magnitude.as_ref().map(zeros).transpose()?,
        })
    }
}

impl Adapter {
    /// A fresh adapter on a model with these linear modules, initialised as the configuration says.
    ///
    /// Each module draws from a random stream of its own, so its values depend on `seed` and its name alone.
    /// `weight` gives the frozen weight of a module, for what starts from it: DoRA's magnitudes.
    ///
    /// # Errors
    /// When a target matches no module, a weight that is needed is not there, or the device has no room or no
    /// kernels for the adapter.
    pub fn new(
        config: AdapterConfig,
        linear: &[LinearModule],
        device: &Device,
        seed: u64,
        weight: impl Fn(&str) -> Option<Arc<Weight>>,
    ) -> Result<Adapter> {
        check_device(&config, device)?;
        let mut modules = BTreeMap::new();
        for target in config.resolve(linear)? {
            let (a, b) = init::weights(config.init_lora_weights, &target, seed);
            let a = Tensor::from_f32(device, [target.rank, target.in_features], &a)?;
            let b = Tensor::from_f32(device, [target.out_features, target.rank], &b)?;
            let magnitude = if config.use_dora {
                let weight = weight(&target.module).ok_or_else(|| {
                    Error::adapter(format!("DoRA needs the weight of `{}`", target.module))
                })?;
                Some(dora::weight_norm(&weight, &a, &b, target.scaling)?)
            } else {
                None
            };
            modules.insert(
                target.module,
                LoraWeights {
                    a,
                    b,
                    scaling: target.scaling,
                    rank: target.rank,
                    magnitude,
                },
            );
        }
        Ok(Adapter { config, modules })
    }

    /// The number of trainable values.
    pub fn parameter_count(&self) -> usize {
        self.modules
            .values()
            .flat_map(LoraWeights::tensors)
            .map(Tensor::element_count)
            .sum()
    }
}

/// Checks that the device can run an adapter of this kind.
fn check_device(config: &AdapterConfig, device: &Device) -> Result<()> {
    if config.use_dora && !device.is_cpu() {
        return Err(Error::adapter(format!(
            "DoRA runs on the CPU only so far, not on {device}: use --device cpu"
        )));
    }
    Ok(())
}

/// The data type of adapters in files, and here.
const DTYPE: DType = DType::F32;
