//! A frozen decoder: loading it, its training pass, its logits.

mod load;
mod modules;
mod rope;
mod training;

use std::ops::Range;
use std::sync::{Arc, RwLock};

use fuselora_tensor::ops::attention::Rows;
use fuselora_tensor::ops::rope::RopeTable;
use fuselora_tensor::ops::{cross_entropy, elementwise, gather};
use fuselora_tensor::{DType, Device, Tensor, Weight};

pub(crate) use load::transpose;
pub use modules::modules;
pub use training::TrainingOptions;

use crate::adapter::Module;
use crate::batch::Batch;
use crate::config::DecoderConfig;
use crate::error::Result;
use crate::layers::attention::{KvCache, Place};
use crate::layers::block::{Block, Residual};
use crate::layers::embedding::{self, Embedding};
use crate::layers::linear::{self, Linear};
use crate::layers::norm::{Norm, Statistics};
use crate::lora::Pass;

/// In a block: the norms of each head's queries and keys.
const QK_NORMS: [&str; 2] = ["self_attn.q_norm", "self_attn.k_norm"];

/// A frozen model on a device.
pub struct Model {
    config: DecoderConfig,
    device: Device,
    activations: DType,
    embedding: Embedding,
    learned_positions: Option<Embedding>,
    blocks: Vec<Block>,
    norm: Norm,
    head: Linear,
    modules: Vec<Module>,
    rope: RwLock<Option<Arc<RopeTable>>>,
}

impl Model {
    /// The mathematics.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The device that holds the weights.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The type of activations, and of the weights where they are floats on a CUDA device.
    pub(crate) fn activations(&self) -> DType {
        self.activations
    }

    /// Every module that an adapter can change, in the order that [`crate::lora::Lora`] uses.
    pub fn modules(&self) -> &[Module] {
        &self.modules
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.block_linears().chain([&self.head])
    }

    pub(crate) fn block_linears(&self) -> impl Iterator<Item = &Linear> {
        self.blocks.iter().flat_map(Block::linears)
    }

    /// The token embedding, then learned positions.
    fn embeddings(&self) -> impl Iterator<Item = &Embedding> {
        [&self.embedding].into_iter().chain(&self.learned_positions)
    }

    /// The frozen weight of a projection or an embedding, by its module path.
    pub fn weight(&self, module: &str) -> Option<Arc<Weight>> {
        let linears = self.linears().map(|linear| (&linear.name, &linear.weight));
        let tables = self.embeddings().map(|table| (&table.name, &table.table));
        let mut weights = linears.chain(tables);
        let (_, weight) = weights.find(|(name, _)| *name == module)?;
        Some(weight.clone())
    }

    /// A norm, by its module path.
    pub fn norm(&self, module: &str) -> Option<&Norm> {
        let mut norms = self
            .blocks
            .iter()
            .flat_map(Block::norms)
            .chain([&self.norm]);
        norms.find(|norm| norm.name == module)
    }

    /// The frozen bias of a projection or a norm, by its module path.
    pub fn bias(&self, module: &str) -> Option<&Tensor> {
        let norm = self.norm(module).and_then(|norm| norm.bias.as_ref());
        let linear = self.linears().find(|linear| linear.name == module);
        norm.or_else(|| linear?.bias.as_ref())
    }

    /// Bytes of the frozen weights, norms and biases, those in mapped files included.
    pub fn weight_bytes(&self) -> usize {
        let linears = || self.blocks.iter().flat_map(Block::linears);
        let norms = || {
            self.blocks
                .iter()
                .flat_map(Block::norms)
                .chain([&self.norm])
        };
        let head = (!self.config.tie_word_embeddings).then_some(&self.head.weight);
        let tables = self.embeddings().map(|table| &table.table);
        let matrices = linears().map(|linear| &linear.weight).chain(tables);
        let matrices = matrices.chain(head).map(|weight| weight.size_in_bytes());
        let biases = linears().chain([&self.head]).map(|linear| &linear.bias);
        let biases = biases.chain(norms().map(|norm| &norm.bias)).flatten();
        let vectors = biases.chain(norms().map(|norm| &norm.weight));
        matrices.sum::<usize>() + vectors.map(Tensor::size_in_bytes).sum::<usize>()
    }

    /// The sum of all embeddings, and what the backward pass of each needs.
    fn embed(
        &self,
        tokens: &Tensor,
        positions: &Tensor,
        pass: &Pass<'_>,
    ) -> Result<(Residual, Vec<embedding::Saved>)> {
        let (mut embedded, saved) = self.embedding.forward(tokens, pass)?;
        let mut all = vec![saved];
        if let Some(table) = &self.learned_positions {
            let (rows, saved) = table.forward(positions, pass)?;
            elementwise::add_assign(&mut embedded, &rows)?;
            all.push(saved);
        }
        pass.check(&embedded, || "the embedding".into())?;
        let residual = Residual {
            sum: Arc::new(embedded),
            delta: None,
        };
        Ok((residual, all))
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
            let (_, normed, _) = self.final_norm(&residual, Some(&chunk.rows), pass)?;
            // Adapters of some tokens have nothing for the head, whose rows are others.
            let pass = &Pass {
                mixed: &[],
                ..*pass
            };
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
        let (_, normed, _) = self.final_norm(&residual, None, pass)?;
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
        let (mut residual, _) = self.embed(batch.tokens(), batch.positions(), pass)?;
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
        pass: &Pass<'_>,
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
                let (sum, y, statistics) = self.norm.forward_add(&sum, delta, pass)?;
                Ok((Arc::new(sum), y, statistics))
            }
            None => {
                let (y, statistics) = self.norm.forward(&sum, pass)?;
                Ok((sum, y, statistics))
            }
        }
    }

    /// Empty caches for generations of up to so many tokens each, a row each: for every block, one for each row.
    ///
    /// # Errors
    /// No room on the device.
    pub fn new_cache(&self, capacities: &[usize]) -> Result<Cache> {
        let width = self.config.num_kv_heads * self.config.head_dim;
        let empty =
            |capacity: usize| Tensor::zeros(&self.device, [capacity, width], self.activations);
        let of_row = |&capacity: &usize| Ok(KvCache::new(empty(capacity)?, empty(capacity)?));
        let of_block = |_: &Block| capacities.iter().map(of_row).collect::<Result<_>>();
        let blocks = self.blocks.iter().map(of_block).collect::<Result<_>>()?;
        Ok(Cache { blocks })
    }

    /// Logits `[rows, vocab]` after the newest tokens of each row, whose earlier ones are in `cache`.
    ///
    /// # Errors
    /// As [`Model::loss`], or a full cache.
    pub fn next_logits(
        &self,
        newest: &[&[u32]],
        cache: &mut Cache,
        pass: &Pass<'_>,
    ) -> Result<Tensor> {
        let lengths: Vec<usize> = newest.iter().map(|tokens| tokens.len()).collect();
        let starts = cache.blocks.first().into_iter().flatten().map(KvCache::len);
        let spans: Vec<Range<usize>> = starts
            .zip(&lengths)
            .map(|(start, len)| start..start + len)
            .collect();
        let rows = Rows::new(&self.device, &lengths)?;
        let rope = self.rope(spans.iter().map(|span| span.end).max().unwrap_or(0))?;
        let vector = |values: Vec<u32>| Tensor::from_u32(&self.device, [values.len()], &values);
        let positions = vector(spans.into_iter().flatten().map(|at| at as u32).collect())?;
        let place = Place {
            positions: &positions,
            rows: &rows,
            rope: rope.as_deref(),
        };
        let (mut residual, _) = self.embed(&vector(newest.concat())?, &positions, pass)?;
        for (block, caches) in self.blocks.iter().zip(&mut cache.blocks) {
            residual = block.forward_cached(residual, &place, pass, caches)?;
        }
        let last = vector(rows.iter().map(|row| row.end as u32 - 1).collect())?;
        let (_, normed, _) = self.final_norm(&residual, Some(&last), pass)?;
        let pass = &Pass {
            mixed: &[],
            ..*pass
        };
        let [logits] = linear::forward(&normed, [&self.head], pass)?;
        Ok(logits.y)
    }
}

/// Keys and values of rows that are being generated.
pub struct Cache {
    /// Of every block, for each row.
    blocks: Vec<Vec<KvCache>>,
}

impl Cache {
    /// Gives the memory of one row back; those after it move up.
    pub fn remove(&mut self, row: usize) {
        for rows in &mut self.blocks {
            rows.remove(row);
        }
    }
}
