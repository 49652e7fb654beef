//! Loading a checkpoint into a model.

use std::collections::BTreeSet;
use std::sync::{Arc, RwLock};

use fuselora_tensor::ops::attention::AttentionConfig;
use fuselora_tensor::{DType, Device, Purpose, Shape, Tensor, Weight};

use super::rope::{FIRST_ROPE_POSITIONS, rope_table};
use super::{Model, QK_NORMS, modules};
use crate::adapter::{Module, ModuleKind};
use crate::checkpoint::{Checkpoint, StoredType};
use crate::config::{DecoderConfig, MlpKind, NormKind};
use crate::error::{Error, Result};
use crate::families::{self, AttentionNames, Layout, OUTPUT_HEAD};
use crate::layers::attention::{Attention, Qkv};
use crate::layers::block::Block;
use crate::layers::embedding::Embedding;
use crate::layers::linear::Linear;
use crate::layers::mlp::{Inner, Mlp};
use crate::layers::norm::Norm;
use crate::quantize::{Nf4Options, quantize_weight, quantized_modules};

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    layout: &'static Layout,
    config: &'a DecoderConfig,
    device: &'a Device,
    dtype: DType,
    modules: Vec<Module>,
    /// The modules to quantize, and how.
    nf4: Option<(BTreeSet<String>, &'a Nf4Options)>,
}

impl Loader<'_> {
    /// The name by which the checkpoint has the tensor `name`, which is of this shape.
    fn stored_name<'n>(&self, name: &'n str, shape: &[usize]) -> Result<&'n str> {
        let name = self.layout.stored_name(self.checkpoint, name);
        let stored = &self.checkpoint.info(name)?.shape;
        if stored[..] != *shape {
            return Err(Error::TensorShape {
                name: name.to_owned(),
                got: Shape::from(&stored[..]).to_string(),
                expected: Shape::from(shape).to_string(),
            });
        }
        Ok(name)
    }

    fn tensor(&self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let name = self.stored_name(name, shape)?;
        self.checkpoint.load(name, self.device, dtype)
    }

    /// The matrix of `module`, `[out, in]` however it is stored.
    fn weight(&self, module: &str, shape: [usize; 2]) -> Result<Arc<Weight>> {
        let name = format!("{module}.weight");
        let stored = self.layout.stored_name(self.checkpoint, &name);
        let nf4 = self.checkpoint.info(stored)?.dtype == StoredType::Nf4;
        // transformers turns GPT-2's matrices to `[out, in]` before it quantizes them.
        let transposed = self.layout.is_transposed(module) && !nf4;
        let [rows, columns] = shape;
        let stored_shape = if transposed { [columns, rows] } else { shape };
        let stored = self.stored_name(&name, &stored_shape)?;
        let (checkpoint, device, dtype) = (self.checkpoint, self.device, self.dtype);
        let quantize = self.nf4.as_ref();
        let weight = match quantize.filter(|(modules, _)| modules.contains(module)) {
            Some((_, options)) => {
                let weight = quantize_weight(checkpoint, stored, dtype, transposed, options)?;
                weight.to_device(device)?.into()
            }
            _ if transposed => Weight::Dense(transpose(&checkpoint.load(stored, device, dtype)?)?),
            _ => checkpoint.load_weight(stored, device, dtype)?,
        };
        Ok(Arc::new(weight))
    }

    fn norm(&self, name: String) -> Result<Norm> {
        let (index, module) = self.module(&name)?;
        let width = module.out_features;
        let bias = || self.tensor(&format!("{name}.bias"), &[width], DType::F32);
        Ok(Norm {
            index,
            weight: self.tensor(&format!("{name}.weight"), &[width], DType::F32)?,
            bias: match self.config.norm {
                NormKind::Rms => None,
                NormKind::Layer => Some(bias()?),
            },
            eps: self.config.norm_eps,
            name,
        })
    }

    fn embedding(&self, name: String) -> Result<Embedding> {
        let (index, module) = self.module(&name)?;
        let table = self.weight(&name, [module.in_features, module.out_features])?;
        Ok(Embedding { name, index, table })
    }

    /// The projection `name`; its place in `modules` gives its shape, bias and index.
    fn linear(&self, name: String) -> Result<Linear> {
        let (index, module) = self.module(&name)?;
        let (out_features, in_features) = (module.out_features, module.in_features);
        let weight = self.weight(&name, [out_features, in_features])?;
        let bias = module
            .bias
            .then(|| self.tensor(&format!("{name}.bias"), &[out_features], DType::F32))
            .transpose()?;
        Ok(Linear {
            name,
            index,
            weight,
            bias,
        })
    }

    fn module(&self, name: &str) -> Result<(usize, &Module)> {
        let mut modules = self.modules.iter().enumerate();
        modules
            .find(|(_, module)| module.name == name)
            .ok_or_else(|| Error::Input(format!("the model has no module `{name}`")))
    }

    fn block(&self, layer: usize) -> Result<Block> {
        let (config, layout) = (self.config, self.layout);
        let norm = |part: &str| self.norm(layout.block(layer, part));
        let linear = |part: &str| self.linear(layout.block(layer, part));
        let up = linear(layout.mlp.up)?;
        Ok(Block {
            input_norm: norm(layout.input_norm)?,
            attention: Attention {
                qkv: match layout.attention {
                    AttentionNames::Split([q, k, v]) => {
                        Qkv::Split(Box::new([linear(q)?, linear(k)?, linear(v)?]))
                    }
                    AttentionNames::Fused(name) => Qkv::Fused(linear(name)?),
                },
                qk_norm: if config.qk_norm {
                    let [q_norm, k_norm] = QK_NORMS;
                    Some([norm(q_norm)?, norm(k_norm)?])
                } else {
                    None
                },
                o_proj: linear(layout.attention_output)?,
                config: AttentionConfig {
                    heads: config.num_heads,
                    kv_heads: config.num_kv_heads,
                    head_dim: config.head_dim,
                    scale: 1.0 / (config.head_dim as f32).sqrt(),
                    window: config.sliding_window,
                },
            },
            post_attention_norm: norm(layout.post_attention_norm)?,
            mlp: Mlp {
                inner: match (config.mlp, layout.mlp.gate) {
                    (MlpKind::SwiGlu, Some(gate)) => Inner::SwiGlu {
                        gate: linear(gate)?,
                        up,
                    },
                    (MlpKind::SwiGlu, None) => {
                        return Err(Error::config("this family's MLP has no gate"));
                    }
                    (MlpKind::Gelu(kind), _) => Inner::Gelu { up, kind },
                },
                down_proj: linear(layout.mlp.down)?,
            },
        })
    }
}

impl Model {
    /// Loads a checkpoint; matrices are held in `dtype`, or in NF4 where they are stored so, norms and biases in F32.
    /// Activations have the type `dtype` too, but on the CPU, where they are F32.
    ///
    /// # Errors
    /// An unsupported configuration, or a tensor that is missing or has another shape than the configuration implies, by
    /// name.
    pub fn load(checkpoint: &Checkpoint, device: &Device, dtype: DType) -> Result<Model> {
        Model::load_quantized(checkpoint, device, dtype, None)
    }

    /// Bytes of the weights that [`Model::load_quantized`] holds, those in mapped files included.
    ///
    /// # Errors
    /// An unsupported configuration, or a tensor that is missing.
    pub fn weight_bytes_when_loaded(
        checkpoint: &Checkpoint,
        dtype: DType,
        nf4: Option<&Nf4Options>,
    ) -> Result<u64> {
        let (family, config) = families::read_config(checkpoint.config())?;
        let quantized = quantized_while_loading(checkpoint, nf4)?;
        let f32_bytes = DType::F32.size_in_bytes();
        let mut bytes = 0;
        for module in modules(family, &config) {
            if module.tied {
                continue;
            }
            let name = format!("{}.weight", module.name);
            let name = family.layout.stored_name(checkpoint, &name);
            let elements: usize = module.weight_shape().iter().product();
            let weight = match (checkpoint.nf4(name), &quantized) {
                (Some(stored), _) => stored.load(&Device::cpu())?.size_in_bytes(),
                (None, Some((modules, options))) if modules.contains(&module.name) => {
                    options.size_in_bytes(elements)
                }
                _ if module.kind == ModuleKind::Norm => elements * f32_bytes,
                _ => elements * dtype.size_in_bytes(),
            };
            let bias = if module.bias { module.out_features } else { 0 };
            bytes += weight + bias * f32_bytes;
        }
        Ok(bytes as u64)
    }

    /// Loads a checkpoint as [`Model::load`] does, and quantizes each projection as it is loaded, where `nf4` says how:
    /// all but the output head, as transformers does with `load_in_4bit`. They are rounded to `dtype` first. A checkpoint
    /// in NF4 is loaded as it is, the modules that it has in floats too.
    ///
    /// # Errors
    /// As [`Model::load`], or a weight with an element that is not finite.
    pub fn load_quantized(
        checkpoint: &Checkpoint,
        device: &Device,
        dtype: DType,
        nf4: Option<&Nf4Options>,
    ) -> Result<Model> {
        let (family, config) = families::read_config(checkpoint.config())?;
        let layout = family.layout;
        let _holding = device.hold(Purpose::Weights);
        let loader = Loader {
            checkpoint,
            layout,
            config: &config,
            device,
            dtype,
            modules: modules(family, &config),
            nf4: quantized_while_loading(checkpoint, nf4)?,
        };
        let embedding = loader.embedding(layout.path(layout.embedding))?;
        let learned_positions = layout
            .positions
            .map(|name| loader.embedding(layout.path(name)))
            .transpose()?;
        let blocks = (0..config.num_layers)
            .map(|layer| loader.block(layer))
            .collect::<Result<_>>()?;
        let norm = loader.norm(layout.path(layout.norm))?;
        let head = if config.tie_word_embeddings {
            let name = OUTPUT_HEAD.to_owned();
            let (index, _) = loader.module(&name)?;
            Linear {
                name,
                index,
                weight: embedding.table.clone(),
                bias: None,
            }
        } else {
            loader.linear(OUTPUT_HEAD.to_owned())?
        };
        let rope = rope_table(
            device,
            &config,
            config.max_position_embeddings.min(FIRST_ROPE_POSITIONS),
        )?;
        let modules = loader.modules;
        Ok(Model {
            config,
            device: device.clone(),
            activations: if device.is_cpu() { DType::F32 } else { dtype },
            embedding,
            learned_positions,
            blocks,
            norm,
            head,
            modules,
            rope: RwLock::new(rope),
        })
    }
}

/// The modules to quantize, and how.
fn quantized_while_loading<'a>(
    checkpoint: &Checkpoint,
    nf4: Option<&'a Nf4Options>,
) -> Result<Option<(BTreeSet<String>, &'a Nf4Options)>> {
    match nf4.filter(|_| checkpoint.nf4_source_dtype().is_none()) {
        Some(options) => Ok(Some((quantized_modules(checkpoint.config())?, options))),
        None => Ok(None),
    }
}

/// `matrix [rows, columns]` as `[columns, rows]`, of the same type.
pub(crate) fn transpose(matrix: &Tensor) -> Result<Tensor> {
    let [rows, columns] = **matrix.shape() else {
        return Err(Error::Input(format!("{} is no matrix", matrix.shape())));
    };
    let values = matrix.to_f32_vec()?;
    let transposed: Vec<f32> = (0..columns)
        .flat_map(|column| values[column..].iter().step_by(columns).take(rows).copied())
        .collect();
    let transposed = Tensor::from_f32(matrix.device(), [columns, rows], &transposed)?;
    Ok(transposed.cast(matrix.dtype())?)
}
