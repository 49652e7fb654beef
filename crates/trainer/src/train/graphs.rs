//! Passes and updates that a device does again as CUDA graphs, instead of being told every kernel again.

use std::collections::VecDeque;

use fuselora_tensor::{Device, Error as TensorError, Graph, Purpose};
use fuselora_transformer::Error;
use fuselora_transformer::batch::{Batch, BatchShape};
use fuselora_transformer::lora::Lora;
use fuselora_transformer::model::Model;

use crate::data::PackedBatch;
use crate::evaluate::to_device;

/// Shapes of batches that are remembered.
const SHAPES: usize = 256;
/// Passes that are kept captured.
const PASSES: usize = 8;

/// The graphs of a run.
///
/// Work is captured when it comes for the second time: what comes once costs nothing.
pub struct Graphs {
    device: Device,
    captures: bool,
    /// The latest first.
    passes: VecDeque<ShapedPass>,
    update: Repeated,
    counts: Counts,
}

/// Passes of a run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// All.
    pub passes: u64,
    /// Those that were graphs.
    pub graphs: u64,
}

/// Passes over batches of one shape.
struct ShapedPass {
    shape: BatchShape,
    /// What the graph reads.
    batch: Option<Batch>,
    pass: Repeated,
}

impl Graphs {
    /// None yet, for the training of `lora` on `model`; says where there never are any.
    pub fn new(model: &Model, lora: &Lora) -> Graphs {
        let device = model.device().clone();
        if device.captures() && lora.derives() {
            eprintln!(
                "CUDA graphs: none, because this adapter has parts that are computed anew after each step (DoRA, \
                 trained tokens, a bias of lora_B, weights of its own beside 16-bit activations)"
            );
        }
        Graphs {
            captures: device.captures() && !lora.derives(),
            device,
            passes: VecDeque::new(),
            update: Repeated::default(),
            counts: Counts::default(),
        }
    }

    /// Does `pass` over a batch.
    ///
    /// # Errors
    /// Those of `pass`, and no room on the device.
    pub fn pass(
        &mut self,
        model: &Model,
        packed: &PackedBatch,
        mut pass: impl FnMut(&Batch) -> Result<(), Error>,
    ) -> anyhow::Result<()> {
        self.counts.passes += 1;
        let shape = packed.shape();
        let known = self.passes.iter().position(|pass| pass.shape == shape);
        let Some(mut shaped) = known.and_then(|known| self.passes.remove(known)) else {
            if self.captures {
                self.passes.truncate(SHAPES - 1);
                self.passes.push_front(ShapedPass {
                    shape,
                    batch: None,
                    pass: Repeated {
                        comes_again: true,
                        graph: None,
                    },
                });
            }
            return Ok(pass(&to_device(model, packed)?)?);
        };
        let batch = match &mut shaped.batch {
            Some(batch) => {
                batch.refill(
                    &packed.tokens,
                    &packed.lengths,
                    &packed.target_rows,
                    &packed.target_ids,
                )?;
                batch
            }
            none => {
                let _holding = self.device.hold(Purpose::Graphs);
                none.insert(to_device(model, packed)?)
            }
        };
        let batch = &*batch;
        match shaped.pass.run(&self.device, || pass(batch))? {
            Ran::AsGraph => self.counts.graphs += 1,
            Ran::AsUsual => shaped.batch = None,
            Ran::NeverAsGraph(why) => {
                self.give_up(&why);
                return Ok(());
            }
        }
        self.passes.push_front(shaped);
        let captured = self.passes.iter_mut().filter(|pass| pass.batch.is_some());
        if let Some(oldest) = captured.skip(PASSES).last() {
            (oldest.batch, oldest.pass) = (None, Repeated::default());
        }
        Ok(())
    }

    /// Does `update`, which is the same in every step.
    ///
    /// # Errors
    /// Those of `update`.
    pub fn update(&mut self, mut update: impl FnMut() -> Result<(), Error>) -> anyhow::Result<()> {
        if !self.captures {
            return Ok(update()?);
        }
        if let Ran::NeverAsGraph(why) = self.update.run(&self.device, update)? {
            self.give_up(&why);
        }
        Ok(())
    }

    /// How many passes were graphs; nothing where none could be.
    pub fn counts(&self) -> Option<Counts> {
        self.captures.then_some(self.counts)
    }

    fn give_up(&mut self, why: &TensorError) {
        eprintln!("CUDA graphs: none from here on: {why}");
        self.captures = false;
        self.passes.clear();
        self.update = Repeated::default();
    }
}

/// Work that may come more than once.
#[derive(Default)]
struct Repeated {
    comes_again: bool,
    graph: Option<Graph>,
}

/// How work was done.
enum Ran {
    AsGraph,
    AsUsual,
    NeverAsGraph(TensorError),
}

impl Repeated {
    /// Does `work`: as a graph from the second time on, where that is possible.
    fn run(
        &mut self,
        device: &Device,
        mut work: impl FnMut() -> Result<(), Error>,
    ) -> Result<Ran, Error> {
        if let Some(graph) = self.graph.take()
            && graph.launch()?
        {
            self.graph = Some(graph);
            return Ok(Ran::AsGraph);
        }
        if !self.comes_again {
            self.comes_again = true;
            work()?;
            return Ok(Ran::AsUsual);
        }
        self.comes_again = false;
        match device.capture(&mut work) {
            Ok(graph) => {
                if graph.launch()? {
                    self.graph = Some(graph);
                    return Ok(Ran::AsGraph);
                }
                work()?;
                Ok(Ran::AsUsual)
            }
            // The memory for it comes together as the work is done as usual.
            Err(Error::Tensor(TensorError::OutOfMemory { .. })) => {
                work()?;
                Ok(Ran::AsUsual)
            }
            Err(Error::Tensor(why @ TensorError::NotCaptured(_))) => {
                work()?;
                Ok(Ran::NeverAsGraph(why))
            }
            Err(error) => Err(error),
        }
    }
}
