//! `metrics.jsonl`: a line per optimizer step and per evaluation.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::Context;
use serde::{Deserialize, Serialize};

/// One optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainMetrics {
    /// Optimizer steps done, this one included.
    pub step: u64,
    /// Passes over the data so far.
    pub epoch: f64,
    /// Mean over the step's target tokens, in nats.
    pub loss: f64,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// The learning rate of this step.
    pub learning_rate: f64,
    /// Tokens that the loss is the mean of.
    pub target_tokens: u64,
    /// All tokens of the step.
    pub tokens: u64,
    /// All tokens per second of the step's wall time.
    pub tokens_per_s: f64,
    /// Most bytes of tensors alive at once so far.
    pub peak_memory_bytes: u64,
}

/// One evaluation on held-out rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalMetrics {
    /// Optimizer steps done before it.
    pub step: u64,
    /// Mean over the held-out target tokens, in nats.
    pub eval_loss: f64,
    /// `exp(eval_loss)`.
    pub eval_perplexity: f64,
    /// Tokens that the loss is the mean of.
    pub eval_target_tokens: u64,
}

/// A line of `metrics.jsonl`; the two kinds have no field but `step` in common.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Metrics {
    /// An optimizer step.
    Train(TrainMetrics),
    /// An evaluation.
    Eval(EvalMetrics),
}

impl Metrics {
    /// Optimizer steps done.
    pub fn step(&self) -> u64 {
        match self {
            Metrics::Train(metrics) => metrics.step,
            Metrics::Eval(metrics) => metrics.step,
        }
    }
}

/// Appends to `metrics.jsonl`; every line is in the file when `append` returns.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Starts a new log in place of an old one.
    ///
    /// # Errors
    /// The system's, with the path.
    pub fn create(path: &Path) -> anyhow::Result<MetricsLog> {
        let file =
            File::create(path).with_context(|| format!("{} cannot be written", path.display()))?;
        Ok(MetricsLog {
            path: path.to_path_buf(),
            file,
        })
    }

    /// Continues a log after `step`, and returns what it holds up to there. Later lines, of steps that an
    /// interrupted run made after its last checkpoint, and a half-written last line are cut off.
    ///
    /// # Errors
    /// The system's, with the path.
    pub fn resume(path: &Path, step: u64) -> anyhow::Result<(MetricsLog, Vec<Metrics>)> {
        let failed = || format!("{} cannot be continued", path.display());
        let bytes = fs::read(path).with_context(failed)?;
        let mut kept = Vec::new();
        let mut length = 0;
        for line in bytes.split_inclusive(|&byte| byte == b'\n') {
            match serde_json::from_slice::<Metrics>(line) {
                Ok(metrics) if line.ends_with(b"\n") && metrics.step() <= step => {
                    kept.push(metrics)
                }
                _ => break,
            }
            length += line.len() as u64;
        }
        let file = OpenOptions::new()
            .append(true)
            .open(path)
            .with_context(failed)?;
        file.set_len(length).with_context(failed)?;
        Ok((
            MetricsLog {
                path: path.to_path_buf(),
                file,
            },
            kept,
        ))
    }

    /// Appends one line.
    ///
    /// # Errors
    /// The system's, with the path.
    pub fn append(&mut self, metrics: &Metrics) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(metrics)?;
        line.push(b'\n');
        self.file
            .write_all(&line)
            .with_context(|| format!("{} cannot be written", self.path.display()))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn train(step: u64, loss: f64) -> Metrics {
        Metrics::Train(TrainMetrics {
            step,
            epoch: step as f64 / 10.0,
            loss,
            grad_norm: 1.5,
            learning_rate: 2e-4,
            target_tokens: 100,
            tokens: 400,
            tokens_per_s: 812.5,
            peak_memory_bytes: 1 << 30,
        })
    }

    pub(crate) fn eval(step: u64, eval_loss: f64) -> Metrics {
        Metrics::Eval(EvalMetrics {
            step,
            eval_loss,
            eval_perplexity: eval_loss.exp(),
            eval_target_tokens: 50,
        })
    }

    #[test]
    fn lines_are_read_back_and_cut_after_the_resumed_step() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut log = MetricsLog::create(&path).unwrap();
        let lines = [
            eval(0, 3.0),
            train(1, 2.5),
            train(2, 2.0),
            eval(2, 2.1),
            train(3, 1.9),
        ];
        for line in &lines {
            log.append(line).unwrap();
        }
        fs::write(
            &path,
            fs::read_to_string(&path).unwrap() + "{\"step\": 4, \"lo",
        )
        .unwrap();

        let (mut log, kept) = MetricsLog::resume(&path, 2).unwrap();
        assert_eq!(kept, lines[..4]);
        log.append(&train(3, 1.8)).unwrap();
        let (_, kept) = MetricsLog::resume(&path, 9).unwrap();
        assert_eq!(kept[..4], lines[..4]);
        assert_eq!(kept[4..], [train(3, 1.8)]);
    }

    #[test]
    fn evaluation_lines_do_not_pass_for_steps() {
        let line: serde_json::Value = serde_json::to_value(eval(2, 2.0)).unwrap();
        assert!(line.get("loss").is_none());
        assert!(line.get("eval_loss").is_some());
    }
}
