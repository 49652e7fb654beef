//! A frozen decoder: loading it, its training pass, its logits.

use std::sync::{Arc, RwLock};

use fuselora_tensor::ops::attention::{AttentionConfig, Rows};
use fuselora_tensor::ops::rope::RopeTable;
use fuselora_tensor::ops::{cross_entropy, gather};
use fuselora_tensor::{DType, Device, Shape, Tensor, Weight};

use crate::adapter::LinearModule;
use crate::batch::Batch;
use crate::checkpoint::Checkpoint;
use crate::config::DecoderConfig;
use crate::error::{Error, Result};
use crate::families;
use crate::layers::attention::{Attention, KvCache, Place};
use crate::layers::block::{Block, Residual, Saved};
use crate::layers::linear::{self, Linear};
use crate::layers::mlp::Mlp;
use crate::layers::norm::Norm;
use crate::lora::{LoraGradients, Pass};

/// A frozen model on a device.
pub struct Model {
    config: DecoderConfig,
    device: Device,
    embedding: Arc<Weight>,
    blocks: Vec<Block>,
    norm: Norm,
    head: Linear,
    linears: Vec<LinearModule>,
    rope: RwLock<Arc<RopeTable>>,
}

/// How a training pass treats memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct TrainingOptions {
    /// Keep only each block's input and compute the rest again in backward.
    pub gradient_checkpointing: bool,
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    device: &'a Device,
    dtype: DType,
    linears: Vec<LinearModule>,
}

impl Loader<'_> {
    fn tensor(&self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let stored = &self.checkpoint.info(name)?.shape;
        if stored[..] != *shape {
            return Err(Error::TensorShape {
                name: name.to_owned(),
                got: Shape::from(&stored[..]).to_string(),
                expected: Shape::from(shape).to_string(),
            });
        }
        self.checkpoint.load(name, self.device, dtype)
    }

    fn weight(&self, name: &str, shape: [usize; 2]) -> Result<Arc<Weight>> {
        Ok(Arc::new(Weight::Dense(
            self.tensor(name, &shape, self.dtype)?,
        )))
    }

    fn norm(&self, name: &str, width: usize, eps: f32) -> Result<Norm> {
        Ok(Norm {
            weight: self.tensor(&format!("{name}.weight"), &[width], DType::F32)?,
            eps,
        })
    }

    /// The projection `name`; its place in `linears` gives its shape and index.
    fn linear(&self, name: String, bias: bool) -> Result<Linear> {
        let (index, module) = self.module(&name)?;
        let (out_features, in_features) = (module.out_features, module.in_features);
        let weight = self.weight(&format!("{name}.weight"), [out_features, in_features])?;
        let bias = bias
            .then(|| self.tensor(&format!("{name}.bias"), &[out_features], DType::F32))
            .transpose()?;
        Ok(Linear {
            name,
            index,
            weight,
            bias,
        })
    }

    fn module(&self, name: &str) -> Result<(usize, &LinearModule)> {
        let mut modules = self.linears.iter().enumerate();
        modules
            .find(|(_, module)| module.name == name)
            .ok_or_else(|| Error::Input(format!("the model has no projection `{name}`")))
    }

    fn block(&self, layer: usize, config: &DecoderConfig) -> Result<Block> {
        let biases = config.biases;
        let norm = |name: &str| self.norm(name, config.hidden_size, config.rms_norm_eps);
        let at = |part: &str| format!("model.layers.{layer}.{part}");
        Ok(Block {
            input_norm: norm(&at("input_layernorm"))?,
            attention: Attention {
                q_proj: self.linear(at("self_attn.q_proj"), biases.qkv)?,
                k_proj: self.linear(at("self_attn.k_proj"), biases.qkv)?,
                v_proj: self.linear(at("self_attn.v_proj"), biases.qkv)?,
                o_proj: self.linear(at("self_attn.o_proj"), biases.output)?,
                config: AttentionConfig {
                    heads: config.num_heads,
                    kv_heads: config.num_kv_heads,
                    head_dim: config.head_dim,
                    scale: 1.0 / (config.head_dim as f32).sqrt(),
                    window: config.sliding_window,
                },
            },
            post_attention_norm: norm(&at("post_attention_layernorm"))?,
            mlp: Mlp {
                gate_proj: self.linear(at("mlp.gate_proj"), biases.mlp)?,
                up_proj: self.linear(at("mlp.up_proj"), biases.mlp)?,
                down_proj: self.linear(at("mlp.down_proj"), biases.mlp)?,
            },
        })
    }
}

/// Positions that the rotary table covers at first; it doubles when a longer row comes.
const FIRST_ROPE_POSITIONS: usize = 2048;

impl Model {
    /// Loads a checkpoint; matrices are held in `dtype`, norms and biases in F32.
    ///
    /// # Errors
    /// An unsupported configuration, or a tensor that is missing or has another shape than the
    /// configuration implies, by name.
    pub fn load(checkpoint: &Checkpoint, device: &Device, dtype: DType) -> Result<Model> {
        let (_, config) = families::read_config(checkpoint.config())?;
        let loader = Loader {
            checkpoint,
            device,
            dtype,
            linears: linear_modules(&config),
        };
        let table = [config.vocab_size, config.hidden_size];
        let embedding = loader.weight("model.embed_tokens.weight", table)?;
        let blocks = (0..config.num_layers)
            .map(|layer| loader.block(layer, &config))
            .collect::<Result<_>>()?;
        let norm = loader.norm("model.norm", config.hidden_size, config.rms_norm_eps)?;
        let head = if config.tie_word_embeddings {
            let name = OUTPUT_HEAD.to_owned();
            let (index, _) = loader.module(&name)?;
            Linear {
                name,
                index,
                weight: embedding.clone(),
                bias: None,
            }
        } else {
            loader.linear(OUTPUT_HEAD.to_owned(), false)?
        };
        let rope = rope_table(
            device,
            &config,
            config.max_position_embeddings.min(FIRST_ROPE_POSITIONS),
        )?;
        let linears = loader.linears;
        Ok(Model {
            config,
            device: device.clone(),
            embedding,
            blocks,
            norm,
            head,
            linears,
            rope: RwLock::new(rope),
        })
    }

    /// The mathematics.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The device that holds the weights.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Every projection that an adapter can target, in the order that [`crate::lora::Lora`] uses; the
    /// output head is the last.
    pub fn linears(&self) -> &[LinearModule] {
        &self.linears
    }

    /// Bytes of the frozen weights.
    pub fn weight_bytes(&self) -> usize {
        let linears = self.blocks.iter().flat_map(|block| {
            let (a, m) = (&block.attention, &block.mlp);
            [
                &a.q_proj,
                &a.k_proj,
                &a.v_proj,
                &a.o_proj,
                &m.gate_proj,
                &m.up_proj,
                &m.down_proj,
            ]
        });
        let head = if self.config.tie_word_embeddings {
            0
        } else {
            self.head.weight.size_in_bytes()
        };
        self.embedding.size_in_bytes()
            + head
            + linears
                .map(|linear| linear.weight.size_in_bytes())
                .sum::<usize>()
    }

    fn rope(&self, positions: usize) -> Result<Arc<RopeTable>> {
        let poisoned = || Error::Input("the rotary table is unusable after a panic".into());
        let table = self.rope.read().map_err(|_| poisoned())?.clone();
        if table.cos.shape()[0] >= positions {
            return Ok(table);
        }
        let mut slot = self.rope.write().map_err(|_| poisoned())?;
        *slot = rope_table(&self.device, &self.config, positions.next_power_of_two())?;
        Ok(slot.clone())
    }

    fn embed(&self, tokens: &Tensor, pass: &Pass<'_>) -> Result<Residual> {
        let embedded = gather::forward(&self.embedding, tokens)?;
        pass.check(&embedded, || "model.embed_tokens".into())?;
        Ok(Residual {
            sum: Arc::new(embedded),
            delta: None,
        })
    }

    /// The summed loss of a batch's targets, in nats, without gradients.
    ///
    /// # Errors
    /// A token outside the vocabulary, or no room on the device.
    pub fn loss(&self, batch: &Batch, pass: &Pass<'_>) -> Result<f64> {
        let residual = self.blocks_forward(batch, pass)?;
        let mut loss = 0.0;
        for chunk in batch.targets() {
            let (_, normed, _) = self.final_norm(&residual, Some(&chunk.rows))?;
            let [logits] = linear::forward(&normed, [&self.head], pass)?;
            loss += cross_entropy::forward(&logits.y, &chunk.targets)?;
        }
        Ok(loss)
    }

    /// Logits of every token of a batch, `[tokens, vocab]` F32.
    ///
    /// # Errors
    /// As [`Model::loss`].
    pub fn logits(&self, batch: &Batch, pass: &Pass<'_>) -> Result<Tensor> {
        let residual = self.blocks_forward(batch, pass)?;
        let (_, normed, _) = self.final_norm(&residual, None)?;
        let [logits] = linear::forward(&normed, [&self.head], pass)?;
        Ok(logits.y)
    }

    fn blocks_forward(&self, batch: &Batch, pass: &Pass<'_>) -> Result<Residual> {
        let rope = self.rope(batch.rows().max_len())?;
        let place = Place {
            positions: batch.positions(),
            rows: batch.rows(),
            rope: &rope,
        };
        let mut residual = self.embed(batch.tokens(), pass)?;
        for block in &self.blocks {
            residual = block.forward(residual, &place, pass, true)?.0;
        }
        Ok(residual)
    }

    /// The final norm over all rows or the given ones: `(sum, y, rstd)`.
    fn final_norm(
        &self,
        residual: &Residual,
        rows: Option<&Tensor>,
    ) -> Result<(Arc<Tensor>, Tensor, Tensor)> {
        let Residual { sum, delta } = residual;
        let (sum, delta) = match rows {
            Some(rows) => {
                let delta = delta
                    .as_ref()
                    .map(|delta| gather::rows(delta, rows))
                    .transpose()?;
                (Arc::new(gather::rows(sum, rows)?), delta)
            }
            None => (
                sum.clone(),
                delta.as_ref().map(Tensor::try_clone).transpose()?,
            ),
        };
        match &delta {
            Some(delta) => {
                let (sum, y, rstd) = self.norm.forward_add(&sum, delta)?;
                Ok((Arc::new(sum), y, rstd))
            }
            None => {
                let (y, rstd) = self.norm.forward(&sum)?;
                Ok((sum, y, rstd))
            }
        }
    }

    /// One training pass over a batch: returns the summed loss and adds `grad_scale` times its
    /// gradient to `gradients`.
    ///
    /// With `grad_scale` = 1 / (target tokens of the optimizer step), the accumulated gradient is
    /// that of the mean loss over all of them, however they are split into micro-batches.
    ///
    /// # Errors
    /// As [`Model::loss`]; in a tracing pass also [`Error::NonFinite`].
    pub fn forward_backward(
        &self,
        batch: &Batch,
        pass: &Pass<'_>,
        gradients: &mut LoraGradients,
        grad_scale: f32,
        options: TrainingOptions,
    ) -> Result<f64> {
        let rope = self.rope(batch.rows().max_len())?;
        let place = Place {
            positions: batch.positions(),
            rows: batch.rows(),
            rope: &rope,
        };
        let lowest = self.lowest_trained_block(pass);
        let mut residual = self.embed(batch.tokens(), pass)?;
        let mut saved: Vec<Saved> = Vec::with_capacity(self.blocks.len());
        for (layer, block) in self.blocks.iter().enumerate() {
            let (next, kept) = block.forward(
                residual,
                &place,
                pass,
                options.gradient_checkpointing || layer < lowest,
            )?;
            if layer >= lowest {
                saved.push(kept);
            }
            residual = next;
        }

        let mut loss = 0.0;
        let mut d_residual = Tensor::zeros(&self.device, residual.sum.shape(), DType::F32)?;
        for chunk in batch.targets() {
            loss += self.head_backward(
                &residual,
                chunk,
                pass,
                gradients,
                grad_scale,
                &mut d_residual,
            )?;
        }
        drop(residual);

        while let Some(kept) = saved.pop() {
            let layer = lowest + saved.len();
            self.blocks[layer].backward(
                &mut d_residual,
                kept,
                &place,
                pass,
                gradients,
                layer > lowest,
            )?;
        }
        Ok(loss)
    }

    /// Norm, head and loss of one chunk of targets, and their backward into the residual's gradient.
    ///
    /// The chunk's logits become their own gradient, so that all logits never exist at once.
    fn head_backward(
        &self,
        residual: &Residual,
        chunk: &crate::batch::TargetChunk,
        pass: &Pass<'_>,
        gradients: &mut LoraGradients,
        grad_scale: f32,
        d_residual: &mut Tensor,
    ) -> Result<f64> {
        let (sum, normed, rstd) = self.final_norm(residual, Some(&chunk.rows))?;
        let [mut logits] = linear::forward(&normed, [&self.head], pass)?;
        let loss = cross_entropy::forward_backward(&mut logits.y, &chunk.targets, grad_scale)?;
        let d_normed = linear::backward(
            &normed,
            [&self.head],
            [&logits.y],
            [logits.h.as_ref()],
            pass,
            gradients,
            true,
        )?;
        if let Some(d_normed) = d_normed {
            let mut d_sum = Tensor::zeros(&self.device, sum.shape(), DType::F32)?;
            self.norm.backward(&d_normed, &sum, &rstd, &mut d_sum)?;
            gather::scatter_add_rows(&d_sum, &chunk.rows, d_residual)?;
        }
        Ok(loss)
    }

    /// The first block with a trained pair; below it no gradient is needed.
    fn lowest_trained_block(&self, pass: &Pass<'_>) -> usize {
        let trained = |linear: &Linear| {
            pass.lora
                .is_some_and(|lora| lora.pair(linear.index).is_some())
        };
        let lowest = self.blocks.iter().position(|block| {
            let (a, m) = (&block.attention, &block.mlp);
            [
                &a.q_proj,
                &a.k_proj,
                &a.v_proj,
                &a.o_proj,
                &m.gate_proj,
                &m.up_proj,
                &m.down_proj,
            ]
            .into_iter()
            .any(trained)
        });
        lowest.unwrap_or(self.blocks.len())
    }

    /// An empty cache for a generation of up to `capacity` tokens.
    ///
    /// # Errors
    /// No room on the device.
    pub fn new_cache(&self, capacity: usize) -> Result<Vec<KvCache>> {
        let width = self.config.num_kv_heads * self.config.head_dim;
        let empty = || Tensor::zeros(&self.device, [capacity, width], DType::F32);
        self.blocks
            .iter()
            .map(|_| Ok(KvCache::new(empty()?, empty()?)))
            .collect()
    }

    /// Logits `[1, vocab]` after the newest `tokens` of a row whose earlier ones are in `cache`.
    ///
    /// # Errors
    /// As [`Model::loss`], or a full cache.
    pub fn next_logits(
        &self,
        tokens: &[u32],
        cache: &mut [KvCache],
        pass: &Pass<'_>,
    ) -> Result<Tensor> {
        let start = cache.first().map_or(0, KvCache::len);
        let positions: Vec<u32> = (start as u32..).take(tokens.len()).collect();
        let positions = Tensor::from_u32(&self.device, [tokens.len()], &positions)?;
        let rows = Rows::new(&self.device, &[tokens.len()])?;
        let rope = self.rope(start + tokens.len())?;
        let place = Place {
            positions: &positions,
            rows: &rows,
            rope: &rope,
        };
        let mut residual = self.embed(
            &Tensor::from_u32(&self.device, [tokens.len()], tokens)?,
            pass,
        )?;
        for (block, cache) in self.blocks.iter().zip(cache) {
            residual = block.forward_cached(residual, &place, pass, cache)?;
        }
        let last = Tensor::from_u32(&self.device, [1], &[tokens.len().saturating_sub(1) as u32])?;
        let (_, normed, _) = self.final_norm(&residual, Some(&last))?;
        let [logits] = linear::forward(&normed, [&self.head], pass)?;
        Ok(logits.y)
    }
}

/// The module path of the output head.
const OUTPUT_HEAD: &str = "lm_head";

/// The projections of a model, in the order that [`Model::linears`] gives; known before it is loaded.
pub fn linear_modules(config: &DecoderConfig) -> Vec<LinearModule> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (q_width, kv_width) = (
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    );
    let block = [
        ("self_attn.q_proj", q_width, hidden),
        ("self_attn.k_proj", kv_width, hidden),
        ("self_attn.v_proj", kv_width, hidden),
        ("self_attn.o_proj", hidden, q_width),
        ("mlp.gate_proj", inner, hidden),
        ("mlp.up_proj", inner, hidden),
        ("mlp.down_proj", hidden, inner),
    ];
    let module = |name: String, out_features: usize, in_features: usize| LinearModule {
        name,
        in_features,
        out_features,
    };
    let blocks = (0..config.num_layers).flat_map(|layer| {
        block.map(|(part, out, input)| module(format!("model.layers.{layer}.{part}"), out, input))
    });
    let head = module(OUTPUT_HEAD.to_owned(), config.vocab_size, hidden);
    blocks.chain([head]).collect()
}

fn rope_table(device: &Device, config: &DecoderConfig, positions: usize) -> Result<Arc<RopeTable>> {
    Ok(Arc::new(RopeTable::new(
        device,
        &config.rope.inv_freq(config.head_dim),
        positions,
        1.0,
    )?))
}
