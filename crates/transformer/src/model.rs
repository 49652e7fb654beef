//! A frozen decoder: loading it, its training pass, its logits.

use std::sync::{Arc, RwLock};

use fuselora_tensor::ops::attention::{AttentionConfig, Rows};
use fuselora_tensor::ops::rope::RopeTable;
use fuselora_tensor::ops::{cross_entropy, elementwise, gather};
use fuselora_tensor::{DType, Device, Purpose, Shape, Tensor, Weight};

use crate::adapter::LinearModule;
use crate::batch::Batch;
use crate::checkpoint::Checkpoint;
use crate::config::{DecoderConfig, MlpKind, NormKind, Positions, RopeScaling};
use crate::error::{Error, Result};
use crate::families::{self, AttentionNames, Family, Layout, OUTPUT_HEAD};
use crate::layers::attention::{Attention, KvCache, Place, Qkv};
use crate::layers::block::{Block, Residual, Saved};
use crate::layers::linear::{self, Linear};
use crate::layers::mlp::{Inner, Mlp};
use crate::layers::norm::{Norm, Statistics};
use crate::lora::{LoraGradients, Pass};

/// A frozen model on a device.
pub struct Model {
    config: DecoderConfig,
    device: Device,
    activations: DType,
    embedding: Arc<Weight>,
    learned_positions: Option<Arc<Weight>>,
    blocks: Vec<Block>,
    norm: Norm,
    head: Linear,
    linears: Vec<LinearModule>,
    rope: RwLock<Option<Arc<RopeTable>>>,
}

/// How a training pass treats memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct TrainingOptions {
    /// Keep only each block's input and compute the rest again in backward.
    pub gradient_checkpointing: bool,
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    layout: &'static Layout,
    config: &'a DecoderConfig,
    device: &'a Device,
    dtype: DType,
    linears: Vec<LinearModule>,
}

impl Loader<'_> {
    fn tensor(&self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let name = self.layout.stored_name(self.checkpoint, name);
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

    /// The matrix of `module`, `[out, in]` however it is stored.
    fn weight(&self, module: &str, shape: [usize; 2]) -> Result<Arc<Weight>> {
        let name = format!("{module}.weight");
        let stored = if self.layout.is_transposed(module) {
            let [rows, columns] = shape;
            transpose(&self.tensor(&name, &[columns, rows], self.dtype)?)?
        } else {
            self.tensor(&name, &shape, self.dtype)?
        };
        Ok(Arc::new(Weight::Dense(stored)))
    }

    fn norm(&self, name: &str, width: usize) -> Result<Norm> {
        let bias = || self.tensor(&format!("{name}.bias"), &[width], DType::F32);
        Ok(Norm {
            weight: self.tensor(&format!("{name}.weight"), &[width], DType::F32)?,
            bias: match self.config.norm {
                NormKind::Rms => None,
                NormKind::Layer => Some(bias()?),
            },
            eps: self.config.norm_eps,
        })
    }

    /// The projection `name`; its place in `linears` gives its shape and index.
    fn linear(&self, name: String, bias: bool) -> Result<Linear> {
        let (index, module) = self.module(&name)?;
        let (out_features, in_features) = (module.out_features, module.in_features);
        let weight = self.weight(&name, [out_features, in_features])?;
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

    fn block(&self, layer: usize) -> Result<Block> {
        let (config, layout) = (self.config, self.layout);
        let biases = config.biases;
        let norm = |part: &str| self.norm(&layout.block(layer, part), config.hidden_size);
        let linear = |part: &str, bias: bool| self.linear(layout.block(layer, part), bias);
        let head_norm = |part: &str| self.norm(&layout.block(layer, part), config.head_dim);
        let up = linear(layout.mlp.up, biases.mlp)?;
        Ok(Block {
            input_norm: norm(layout.input_norm)?,
            attention: Attention {
                qkv: match layout.attention {
                    AttentionNames::Split([q, k, v]) => Qkv::Split(Box::new([
                        linear(q, biases.qkv)?,
                        linear(k, biases.qkv)?,
                        linear(v, biases.qkv)?,
                    ])),
                    AttentionNames::Fused(name) => Qkv::Fused(linear(name, biases.qkv)?),
                },
                qk_norm: if config.qk_norm {
                    Some([
                        head_norm("self_attn.q_norm")?,
                        head_norm("self_attn.k_norm")?,
                    ])
                } else {
                    None
                },
                o_proj: linear(layout.attention_output, biases.output)?,
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
                        gate: linear(gate, biases.mlp)?,
                        up,
                    },
                    (MlpKind::SwiGlu, None) => {
                        return Err(Error::config("this family's MLP has no gate"));
                    }
                    (MlpKind::Gelu(kind), _) => Inner::Gelu { up, kind },
                },
                down_proj: linear(layout.mlp.down, biases.mlp)?,
            },
        })
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

/// Positions that the rotary table covers at first; it doubles when a longer row comes.
const FIRST_ROPE_POSITIONS: usize = 2048;

impl Model {
    /// Loads a checkpoint; matrices are held in `dtype`, norms and biases in F32. Activations have the type `dtype`
    /// too, but on the CPU, where they are F32.
    ///
    /// # Errors
    /// An unsupported configuration, or one that the device has no kernels for, or a tensor that is missing or
    /// has another shape than the configuration implies, by name.
    pub fn load(checkpoint: &Checkpoint, device: &Device, dtype: DType) -> Result<Model> {
        let (family, config) = families::read_config(checkpoint.config())?;
        let layout = family.layout;
        if matches!(layout.attention, AttentionNames::Fused(_)) && !device.is_cpu() {
            return Err(Error::Input(format!(
                "models with a fused query, key and value projection run on the CPU only so far, not on {device}: use --device cpu"
            )));
        }
        let _holding = device.hold(Purpose::Weights);
        let loader = Loader {
            checkpoint,
            layout,
            config: &config,
            device,
            dtype,
            linears: linear_modules(family, &config),
        };
        let hidden = config.hidden_size;
        let embedding =
            loader.weight(&layout.path(layout.embedding), [config.vocab_size, hidden])?;
        let learned_positions = layout
            .positions
            .map(|name| loader.weight(&layout.path(name), [config.max_position_embeddings, hidden]))
            .transpose()?;
        let blocks = (0..config.num_layers)
            .map(|layer| loader.block(layer))
            .collect::<Result<_>>()?;
        let norm = loader.norm(&layout.path(layout.norm), hidden)?;
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
            activations: if device.is_cpu() { DType::F32 } else { dtype },
            embedding,
            learned_positions,
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

    /// The frozen weight of a projection, by its module path.
    pub fn weight(&self, module: &str) -> Option<Arc<Weight>> {
        let blocks = self.blocks.iter().flat_map(Block::linears);
        let mut linears = blocks.chain([&self.head]);
        let linear = linears.find(|linear| linear.name == module)?;
        Some(linear.weight.clone())
    }

    /// Bytes of the frozen weights.
    pub fn weight_bytes(&self) -> usize {
        let linears = self.blocks.iter().flat_map(Block::linears);
        let positions = self.learned_positions.as_ref();
        let head = if self.config.tie_word_embeddings {
            0
        } else {
            self.head.weight.size_in_bytes()
        };
        self.embedding.size_in_bytes()
            + positions.map_or(0, |table| table.size_in_bytes())
            + head
            + linears
                .map(|linear| linear.weight.size_in_bytes())
                .sum::<usize>()
    }

    /// The rotary table of rows of up to `positions` tokens, unless positions are learned.
    fn rope(&self, positions: usize) -> Result<Option<Arc<RopeTable>>> {
        if self.learned_positions.is_some() {
            let longest = self.config.max_position_embeddings;
            return if positions <= longest {
                Ok(None)
            } else {
                Err(Error::Input(format!(
                    "a row of {positions} tokens is longer than the {longest} positions that this model has learned"
                )))
            };
        }
        if self.depends_on_length() && positions > self.config.max_position_embeddings {
            return rope_table(&self.device, &self.config, positions);
        }
        let poisoned = || Error::Input("the rotary table is unusable after a panic".into());
        let table = self.rope.read().map_err(|_| poisoned())?.clone();
        if table
            .as_ref()
            .is_some_and(|t| t.cos.shape()[0] >= positions)
        {
            return Ok(table);
        }
        let mut slot = self.rope.write().map_err(|_| poisoned())?;
        let covered = if self.depends_on_length() {
            self.config.max_position_embeddings
        } else {
            positions.next_power_of_two()
        };
        *slot = rope_table(&self.device, &self.config, covered)?;
        Ok(slot.clone())
    }

    /// Whether rotary frequencies change with the longest row.
    fn depends_on_length(&self) -> bool {
        let Positions::Rotary(rope) = &self.config.positions else {
            return false;
        };
        matches!(rope.scaling, RopeScaling::Dynamic { .. })
    }

    fn embed(&self, tokens: &Tensor, positions: &Tensor, pass: &Pass<'_>) -> Result<Residual> {
        let mut embedded = gather::forward(&self.embedding, tokens)?;
        if let Some(table) = &self.learned_positions {
            elementwise::add_assign(&mut embedded, &gather::forward(table, positions)?)?;
        }
        pass.check(&embedded, || "the embedding".into())?;
        Ok(Residual {
            sum: Arc::new(embedded),
            delta: None,
        })
    }

    /// Zero, to which passes add their loss: `[1]` F32 on the device.
    ///
    /// # Errors
    /// No room on the device.
    pub fn zero_loss(&self) -> Result<Tensor> {
        Ok(Tensor::zeros(&self.device, [1], DType::F32)?)
    }

    /// Adds the summed loss of a batch's targets, in nats, to `loss`, without gradients.
    ///
    /// # Errors
    /// A token outside the vocabulary, or no room on the device.
    pub fn loss(&self, batch: &Batch, pass: &Pass<'_>, loss: &mut Tensor) -> Result<()> {
        let residual = self.blocks_forward(batch, pass)?;
        for chunk in batch.targets() {
            let (_, normed, _) = self.final_norm(&residual, Some(&chunk.rows))?;
            let [logits] = linear::forward(&normed, [&self.head], pass)?;
            cross_entropy::forward(&logits.y, &chunk.targets, loss)?;
        }
        Ok(())
    }

    /// Logits of every token of a batch, `[tokens, vocab]` F32.
    ///
    /// # Errors
    /// As [`Model::loss`].
    pub fn logits(&self, batch: &Batch, pass: &Pass<'_>) -> Result<Tensor> {
        let residual = self.blocks_forward(batch, pass)?;
        let (_, normed, _) = self.final_norm(&residual, None)?;
        let [logits] = linear::forward(&normed, [&self.head], pass)?;
        match logits.y.dtype() {
            DType::F32 => Ok(logits.y),
            _ => Ok(logits.y.cast(DType::F32)?),
        }
    }

    fn blocks_forward(&self, batch: &Batch, pass: &Pass<'_>) -> Result<Residual> {
        let rope = self.rope(batch.rows().max_len())?;
        let place = Place {
            positions: batch.positions(),
            rows: batch.rows(),
            rope: rope.as_deref(),
        };
        let mut residual = self.embed(batch.tokens(), batch.positions(), pass)?;
        for block in &self.blocks {
            residual = block.forward(residual, &place, pass, true)?.0;
        }
        Ok(residual)
    }

    /// The final norm over all rows or the given ones: `(sum, y, statistics)`.
    fn final_norm(
        &self,
        residual: &Residual,
        rows: Option<&Tensor>,
    ) -> Result<(Arc<Tensor>, Tensor, Statistics)> {
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
                let (sum, y, statistics) = self.norm.forward_add(&sum, delta)?;
                Ok((Arc::new(sum), y, statistics))
            }
            None => {
                let (y, statistics) = self.norm.forward(&sum)?;
                Ok((sum, y, statistics))
            }
        }
    }

    /// One training pass over a batch: adds the summed loss to `loss`, and `grad_scale` times its
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
        loss: &mut Tensor,
    ) -> Result<()> {
        let rope = self.rope(batch.rows().max_len())?;
        let place = Place {
            positions: batch.positions(),
            rows: batch.rows(),
            rope: rope.as_deref(),
        };
        let lowest = self.lowest_trained_block(pass);
        let mut residual = self.embed(batch.tokens(), batch.positions(), pass)?;
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

        let mut d_residual = Tensor::zeros(&self.device, residual.sum.shape(), self.activations)?;
        for chunk in batch.targets() {
            self.head_backward(
                &residual,
                chunk,
                pass,
                gradients,
                grad_scale,
                &mut d_residual,
                loss,
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
        Ok(())
    }

    /// Norm, head and loss of one chunk of targets, and their backward into the residual's gradient.
    ///
    /// The chunk's logits become their own gradient, so that all logits never exist at once.
    #[expect(
        clippy::too_many_arguments,
        reason = "what a pass reads, and the three that it adds to"
    )]
    fn head_backward(
        &self,
        residual: &Residual,
        chunk: &crate::batch::TargetChunk,
        pass: &Pass<'_>,
        gradients: &mut LoraGradients,
        grad_scale: f32,
        d_residual: &mut Tensor,
        loss: &mut Tensor,
    ) -> Result<()> {
        let (sum, normed, statistics) = self.final_norm(residual, Some(&chunk.rows))?;
        let [mut logits] = linear::forward(&normed, [&self.head], pass)?;
        cross_entropy::forward_backward(&mut logits.y, &chunk.targets, grad_scale, loss)?;
        let d_normed = linear::backward(
            &normed,
            [&self.head],
            [&logits.y],
            [&logits.saved],
            pass,
            gradients,
            true,
        )?;
        if let Some(d_normed) = d_normed {
            let mut d_sum = Tensor::zeros(&self.device, sum.shape(), self.activations)?;
            self.norm
                .backward(&d_normed, &sum, &statistics, &mut d_sum)?;
            gather::scatter_add_rows(&d_sum, &chunk.rows, d_residual)?;
        }
        Ok(())
    }

    /// The first block with a trained pair; below it no gradient is needed.
    fn lowest_trained_block(&self, pass: &Pass<'_>) -> usize {
        let trained = |linear: &Linear| {
            pass.lora
                .is_some_and(|lora| lora.pair(linear.index).is_some())
        };
        let mut blocks = self.blocks.iter();
        let lowest = blocks.position(|block| block.linears().any(trained));
        lowest.unwrap_or(self.blocks.len())
    }

    /// An empty cache for a generation of up to `capacity` tokens.
    ///
    /// # Errors
    /// No room on the device.
    pub fn new_cache(&self, capacity: usize) -> Result<Vec<KvCache>> {
        let width = self.config.num_kv_heads * self.config.head_dim;
        let empty = || Tensor::zeros(&self.device, [capacity, width], self.activations);
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
            rope: rope.as_deref(),
        };
        let mut residual = self.embed(
            &Tensor::from_u32(&self.device, [tokens.len()], tokens)?,
            &positions,
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

/// The projections of a model, in the order that [`Model::linears`] gives; known before it is loaded.
pub fn linear_modules(family: &Family, config: &DecoderConfig) -> Vec<LinearModule> {
    let layout = family.layout;
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (q_width, kv_width) = (
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    );
    let mut block = match layout.attention {
        AttentionNames::Split([q, k, v]) => vec![
            (q, q_width, hidden),
            (k, kv_width, hidden),
            (v, kv_width, hidden),
        ],
        AttentionNames::Fused(name) => vec![(name, q_width + 2 * kv_width, hidden)],
    };
    block.push((layout.attention_output, hidden, q_width));
    block.extend(layout.mlp.gate.map(|gate| (gate, inner, hidden)));
    block.push((layout.mlp.up, inner, hidden));
    block.push((layout.mlp.down, hidden, inner));
    let module = |name: String, out_features: usize, in_features: usize| LinearModule {
        name,
        in_features,
        out_features,
    };
    let blocks = (0..config.num_layers).flat_map(|layer| {
        block
            .iter()
            .map(move |&(part, out, input)| module(layout.block(layer, part), out, input))
    });
    let head = module(OUTPUT_HEAD.to_owned(), config.vocab_size, hidden);
    blocks.chain([head]).collect()
}

/// The table of a model with rotary positions.
fn rope_table(
    device: &Device,
    config: &DecoderConfig,
    positions: usize,
) -> Result<Option<Arc<RopeTable>>> {
    let Positions::Rotary(rope) = &config.positions else {
        return Ok(None);
    };
    let inv_freq = rope.inv_freq(config.head_dim, positions);
    Ok(Some(Arc::new(RopeTable::new(
        device, &inv_freq, positions, 1.0,
    )?)))
}
