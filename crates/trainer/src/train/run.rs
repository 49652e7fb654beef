//! The loop.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use fuselora_tensor::{DType, Device, Purpose, Tensor};
use fuselora_transformer::adapter::Module;
use fuselora_transformer::batch::Batch;
use fuselora_transformer::lora::{DropoutSeed, Lora, LoraGradients, Pass};
use fuselora_transformer::model::TrainingOptions;
use fuselora_transformer::{Error, atomic_file};

use super::graphs::{Counts, Graphs};
use super::optimizer::{Optimizer, gradient_norm};
use super::saved_state::{self, State};
use super::{adapter, answers};
use crate::base_model::BaseModel;
use crate::cli::TrainConfig;
use crate::data::{DataFiles, Dataset, PackedBatch, Position, Row, Sampler};
use crate::evaluate::{evaluate, scalar, to_device};
use crate::interrupt::Interrupt;
use crate::machine::Machine;
use crate::mistake;
use crate::records::{
    Answer, Curve, EvalMetrics, EventWriter, Metrics, MetricsLog, Progress, Report, Theme,
    TrainMetrics,
};

/// How a run ended.
pub struct Outcome {
    /// Whether it was stopped before its last step.
    pub interrupted: bool,
    /// Optimizer steps done.
    pub step: u64,
    /// Held-out loss before and after.
    pub eval_loss: Option<(f64, f64)>,
    /// Held-out prompts with both answers.
    pub answers: Vec<Answer>,
    /// Files written: the report, the plot.
    pub files: Vec<PathBuf>,
}

/// Everything that a run carries from step to step.
struct Run<'a> {
    config: &'a TrainConfig,
    output: &'a Path,
    base: BaseModel,
    rows: Vec<Row>,
    held_out: Vec<Row>,
    lora: Lora,
    gradients: LoraGradients,
    optimizer: Optimizer,
    numbers: StepNumbers,
    graphs: Graphs,
    sampler: Sampler,
    state: State,
    metrics: Vec<Metrics>,
    log: MetricsLog,
    events: EventWriter,
    training_seconds: f64,
}

/// The numbers of a step, on the device: so its passes and its update differ in nothing that the host tells it.
struct StepNumbers {
    /// The part of the mean loss that one target token is, `[1]` F32.
    grad_scale: Tensor,
    /// Batches passed forward before, `[1]` U32.
    micro_step: Tensor,
    /// The summed loss of the step's batches, `[1]` F32.
    loss: Tensor,
    /// The norm of its gradients before they are clipped, `[1]` F32.
    grad_norm: Tensor,
}

impl StepNumbers {
    fn new(device: &Device) -> anyhow::Result<StepNumbers> {
        let _holding = device.hold(Purpose::Optimizer);
        let zero = |dtype| Tensor::zeros(device, [1], dtype);
        Ok(StepNumbers {
            grad_scale: zero(DType::F32)?,
            micro_step: zero(DType::U32)?,
            loss: zero(DType::F32)?,
            grad_norm: zero(DType::F32)?,
        })
    }
}

/// Trains as `config` says, and writes adapter, checkpoint, metrics, plot and report to its output folder.
///
/// # Errors
/// A [`mistake::Mistake`] for what the user can mend: settings, files, data, a loss that is no number.
pub fn run(config: &TrainConfig, interrupt: &Interrupt) -> anyhow::Result<Outcome> {
    config.validate()?;
    let machine = Machine::open(&config.machine)?;
    let mut config = config.clone();
    config.machine.dtype = Some(machine.dtype);
    let config = &config;
    let mut run = Run::start(config, &machine)?;
    let total_steps = config.total_steps(run.sampler.steps_per_epoch());
    let schedule = config.schedule(total_steps);
    if run.state.step == 0 {
        run.look_before()?;
    }
    run.save()?;

    let progress = Progress::new(total_steps, run.state.step, config.intervals.logging_steps);
    let every = |interval: Option<u64>, step: u64| interval.is_some_and(|n| step.is_multiple_of(n));
    while run.state.step < total_steps && !interrupt.requested() {
        let metrics = run.step(schedule.learning_rate(run.state.step))?;
        progress.step(&metrics);
        let step = metrics.step;
        run.record(Metrics::Train(metrics))?;
        if every(config.intervals.eval_steps, step) && step < total_steps {
            let loss = run.evaluate()?;
            if let Some(loss) = loss {
                progress.say(&format!("step {step}: held-out loss {loss:.4}"));
            }
        }
        if every(config.intervals.save_steps, step) && step < total_steps {
            run.save()?;
        }
    }
    progress.finish();
    let interrupted = run.state.step < total_steps;
    run.save()?;
    run.lora.write(run.output)?;
    if interrupted {
        return Ok(Outcome {
            interrupted,
            step: run.state.step,
            eval_loss: None,
            answers: Vec::new(),
            files: Vec::new(),
        });
    }
    run.finish()
}

impl<'a> Run<'a> {
    fn start(config: &'a TrainConfig, machine: &Machine) -> anyhow::Result<Run<'a>> {
        let output = config.output()?;
        let files = DataFiles::find(config.data()?, config.eval_data.as_deref())?;
        let settings = config.settings()?.into_iter().collect();
        let resumed = if config.resume {
            Some(saved_state::read(output, &settings)?)
        } else {
            None
        };
        let base = BaseModel::load(config.model()?, machine)?;
        let read = |file: &Path, what: &str| -> anyhow::Result<Dataset> {
            let (dataset, limits) = base.dataset(file, &config.rows, true)?;
            eprintln!("{what}: {}: {}", file.display(), dataset.summary(limits));
            Ok(dataset)
        };
        let rows = read(&files.train, "training data")?.rows;
        let held_out = match &files.valid {
            Some(file) => read(file, "held-out data")?.rows,
            None => Vec::new(),
        };

        let lora = adapter::start(config, &base)?;
        let (device, modules) = (base.model.device(), base.model.modules());
        let mut optimizer = Optimizer::new(device, &lora, modules, &config.optimization)?;
        fs::create_dir_all(output)
            .with_context(|| format!("{} cannot be made", output.display()))?;
        let log_path = output.join("metrics.jsonl");
        let (state, log, metrics, events) = match resumed {
            Some(state) => {
                saved_state::read_moments(output, &lora, &mut optimizer)?;
                optimizer.step = state.step;
                let (log, metrics) = MetricsLog::resume(&log_path, state.step)?;
                let events = EventWriter::create(&output.join("tensorboard"), Some(state.step))?;
                (state, log, metrics, events)
            }
            None => {
                let state = State {
                    step: 0,
                    micro_step: 0,
                    position: Position::default(),
                    eval_loss_before: None,
                    answers: Vec::new(),
                    settings,
                };
                let events = EventWriter::create(&output.join("tensorboard"), None)?;
                (state, MetricsLog::create(&log_path)?, Vec::new(), events)
            }
        };
        atomic_file::write_bytes(&output.join("run.toml"), config.to_toml()?)?;

        let total: usize = base
            .model
            .modules()
            .iter()
            .map(Module::parameter_count)
            .sum();
        let trained = lora.parameter_count();
        let share = 100.0 * trained as f64 / (total + trained) as f64;
        eprintln!(
            "adapter: {} modules, {trained} trained parameters ({share:.2} % of all)",
            lora.module_count()
        );

        let optimization = &config.optimization;
        let sampler = Sampler::new(
            rows.len(),
            optimization.batch_size,
            optimization.gradient_accumulation_steps,
            config.shuffle_seed(),
            state.position,
        );
        let gradients = LoraGradients::zeros(&lora)?;
        let numbers = StepNumbers::new(base.model.device())?;
        let graphs = Graphs::new(&base.model, &lora);
        Ok(Run {
            config,
            output,
            base,
            rows,
            held_out,
            lora,
            gradients,
            optimizer,
            numbers,
            graphs,
            sampler,
            state,
            metrics,
            log,
            events,
            training_seconds: 0.0,
        })
    }

    /// Held-out loss and answers before the first step.
    fn look_before(&mut self) -> anyhow::Result<()> {
        self.state.eval_loss_before = self.evaluate()?;
        let count = self.config.intervals.sample_answers;
        self.state.answers = answers::before(&self.base, &self.lora, &self.held_out, count)?;
        Ok(())
    }

    fn evaluate(&mut self) -> anyhow::Result<Option<f64>> {
        if self.held_out.is_empty() {
            return Ok(None);
        }
        let batch_size = self.config.optimization.batch_size;
        let found = evaluate(
            &self.base.model,
            Some(&self.lora),
            &self.held_out,
            batch_size,
        )?;
        self.record(Metrics::Eval(EvalMetrics {
            step: self.state.step,
            eval_loss: found.loss,
            eval_perplexity: found.perplexity,
            eval_target_tokens: found.target_tokens,
        }))?;
        Ok(Some(found.loss))
    }

    fn record(&mut self, metrics: Metrics) -> anyhow::Result<()> {
        self.log.append(&metrics)?;
        self.events.append(&metrics)?;
        self.metrics.push(metrics);
        Ok(())
    }

    fn save(&mut self) -> anyhow::Result<()> {
        self.state.position = self.sampler.position();
        saved_state::save(self.output, &self.lora, &self.optimizer, &self.state)
    }

    /// One optimizer step; the loss is the mean over all target tokens of its batches.
    fn step(&mut self, learning_rate: f64) -> anyhow::Result<TrainMetrics> {
        let start = Instant::now();
        let batches: Vec<PackedBatch> = self
            .sampler
            .next_step()
            .iter()
            .map(|batch| PackedBatch::pack(batch.iter().map(|&row| &self.rows[row])))
            .collect();
        let target_tokens: usize = batches.iter().map(PackedBatch::target_count).sum();
        let tokens: usize = batches.iter().map(|batch| batch.tokens.len()).sum();
        self.forward_backward(&batches, target_tokens, false)?;
        self.update(learning_rate)?;
        // The first look at what the device has computed: until here it was only told what to do.
        let loss = scalar(&self.numbers.loss)? / target_tokens as f64;
        let grad_norm = scalar(&self.numbers.grad_norm)?;
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(self.explain_nonfinite(&batches, target_tokens, loss));
        }
        self.state.step += 1;
        self.state.micro_step = self.state.micro_step.wrapping_add(batches.len() as u32);
        let seconds = start.elapsed().as_secs_f64();
        self.training_seconds += seconds;
        Ok(TrainMetrics {
            step: self.state.step,
            epoch: self.sampler.epochs(),
            loss,
            grad_norm,
            learning_rate,
            target_tokens: target_tokens as u64,
            tokens: tokens as u64,
            tokens_per_s: tokens as f64 / seconds,
            peak_memory_bytes: self.base.model.device().memory().peak,
        })
    }

    /// Adds up the loss and the gradients of a step's batches, on the device.
    fn forward_backward(
        &mut self,
        batches: &[PackedBatch],
        target_tokens: usize,
        trace: bool,
    ) -> anyhow::Result<()> {
        let options = TrainingOptions {
            gradient_checkpointing: self.config.gradient_checkpointing,
        };
        let model = &self.base.model;
        self.numbers.loss.fill_zero()?;
        let grad_scale = 1.0 / target_tokens as f32;
        self.numbers.grad_scale.set_f32(&[grad_scale])?;
        for (batch, micro_step) in batches.iter().zip(self.state.micro_step..) {
            self.numbers.micro_step.set_u32(&[micro_step])?;
            let dropout = DropoutSeed {
                seed: self.config.optimization.seed,
                step: &self.numbers.micro_step,
            };
            let pass = Pass {
                lora: Some(&self.lora),
                mixed: &[],
                dropout: Some(dropout),
                trace,
            };
            let mut over = |batch: &Batch| {
                model.forward_backward(
                    batch,
                    &pass,
                    &mut self.gradients,
                    &self.numbers.grad_scale,
                    options,
                    &mut self.numbers.loss,
                )
            };
            match trace {
                true => over(&to_device(model, batch)?)?,
                false => self.graphs.pass(model, batch, over)?,
            }
        }
        Ok(())
    }

    /// Updates the adapter by the gradients, which go back to zero for the next step.
    fn update(&mut self, learning_rate: f64) -> anyhow::Result<()> {
        let settings = &self.config.optimization;
        self.optimizer.begin_step(learning_rate, settings)?;
        self.graphs.update(|| {
            let grad_norm = &mut self.numbers.grad_norm;
            gradient_norm(&self.gradients, grad_norm)?;
            self.optimizer
                .update(&mut self.lora, &self.gradients, grad_norm, settings)?;
            self.gradients.clear()
        })
    }

    /// Runs the step again with every result searched for NaN and infinity.
    fn explain_nonfinite(
        &mut self,
        batches: &[PackedBatch],
        target_tokens: usize,
        loss: f64,
    ) -> anyhow::Error {
        let step = self.state.step + 1;
        let first = match self.forward_backward(batches, target_tokens, true) {
            Err(error) => match error.downcast::<Error>() {
                Ok(Error::NonFinite { operation }) => operation,
                Ok(error) => return error.into(),
                Err(error) => return error,
            },
            Ok(_) if loss.is_finite() => "the gradient of an adapter's weight".to_owned(),
            Ok(_) => "the loss".to_owned(),
        };
        mistake!(
            "step {step}: the loss or its gradient is not a finite number; the first operation with a NaN or infinite \
             result is {first}. Lower --learning-rate (or set --max-grad-norm); the adapter of the last save is in {}",
            saved_state::folder(self.output).display()
        )
    }

    /// Held-out loss and answers after the last step, the plot and the report.
    fn finish(mut self) -> anyhow::Result<Outcome> {
        let eval_loss_after = self.evaluate()?;
        let mut answers = std::mem::take(&mut self.state.answers);
        answers::after(&self.base, &self.lora, &self.held_out, &mut answers)?;
        let title = format!(
            "{} on {}",
            name(self.config.model()?),
            name(self.config.data()?)
        );
        let curve = Curve::of(title.clone(), &self.metrics);
        let mut files = Vec::new();
        let mut write = |name: &str, bytes: &[u8]| -> anyhow::Result<()> {
            let path = self.output.join(name);
            atomic_file::write_bytes(&path, bytes)?;
            files.push(path);
            Ok(())
        };
        write("loss.svg", curve.svg(Theme::LIGHT)?.as_bytes())?;
        write("loss.png", &curve.png()?)?;
        let report = Report {
            title,
            figures: self.figures(),
            curve,
            eval_loss_before: self.state.eval_loss_before,
            eval_loss_after,
            answers,
            settings: self.config.settings()?,
        };
        write("report.html", report.html()?.as_bytes())?;
        Ok(Outcome {
            interrupted: false,
            step: self.state.step,
            eval_loss: self.state.eval_loss_before.zip(eval_loss_after),
            answers: report.answers,
            files,
        })
    }

    fn figures(&self) -> Vec<(String, String)> {
        let tokens: u64 = self
            .metrics
            .iter()
            .filter_map(|m| match m {
                Metrics::Train(m) => Some(m.tokens),
                Metrics::Eval(_) => None,
            })
            .sum();
        let peak = self.base.model.device().memory().peak;
        let mut figures = vec![
            ("steps".to_owned(), self.state.step.to_string()),
            ("tokens".to_owned(), tokens.to_string()),
            (
                "peak memory of tensors".to_owned(),
                format!("{:.0} MiB", peak as f64 / (1 << 20) as f64),
            ),
        ];
        if let Some(Counts { passes, graphs }) = self.graphs.counts() {
            let name = "passes repeated as CUDA graphs".to_owned();
            figures.push((name, format!("{graphs} of {passes}")));
        }
        // A resumed run has timed only its own steps.
        if !self.config.resume && self.training_seconds > 0.0 {
            figures.push((
                "tokens/s".to_owned(),
                format!("{:.0}", tokens as f64 / self.training_seconds),
            ));
        }
        figures
    }
}

fn name(path: &Path) -> String {
    path.file_name().map_or_else(
        || path.display().to_string(),
        |name| name.to_string_lossy().into_owned(),
    )
}
