//! What the user sees while a run goes on: a bar in a terminal, plain lines elsewhere.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::TrainMetrics;

const BAR: &str = "{bar:24.cyan/blue} {pos}/{len}  {msg}";

/// The progress of a training run, on standard error.
pub struct Progress {
    bar: ProgressBar,
    interactive: bool,
    logging_steps: u64,
    total_steps: u64,
    first_step: u64,
    started: Instant,
}

impl Progress {
    /// Progress of `total_steps` optimizer steps, of which `done_steps` were made by an earlier run. Where
    /// standard error is no terminal, a line is printed every `logging_steps` steps instead of a bar.
    pub fn new(total_steps: u64, done_steps: u64, logging_steps: u64) -> Progress {
        let interactive = std::io::stderr().is_terminal();
        let target = if interactive {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let style =
            ProgressStyle::with_template(BAR).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::with_draw_target(Some(total_steps), target)
            .with_style(style.progress_chars("━╸─"));
        bar.set_position(done_steps);
        Progress {
            bar,
            interactive,
            logging_steps: logging_steps.max(1),
            total_steps,
            first_step: done_steps,
            started: Instant::now(),
        }
    }

    /// Shows a finished step.
    pub fn step(&self, metrics: &TrainMetrics) {
        let line = step_line(metrics, self.remaining(metrics.step));
        if self.interactive {
            self.bar.set_message(line);
            self.bar.set_position(metrics.step);
        } else if metrics.step.is_multiple_of(self.logging_steps)
            || metrics.step == self.total_steps
        {
            eprintln!("step {}/{}  {line}", metrics.step, self.total_steps);
        }
    }

    /// Prints a line that stays, above the bar.
    pub fn say(&self, line: &str) {
        if self.interactive {
            self.bar.println(line)
        } else {
            eprintln!("{line}")
        }
    }

    /// Ends the bar and leaves its last state on the screen.
    pub fn finish(&self) {
        self.bar.abandon();
    }

    /// The time to go at the mean speed of this run so far.
    fn remaining(&self, step: u64) -> Duration {
        let done = step.saturating_sub(self.first_step).max(1) as f64;
        let ahead = self.total_steps.saturating_sub(step) as f64;
        self.started.elapsed().mul_f64(ahead / done)
    }
}

fn step_line(metrics: &TrainMetrics, remaining: Duration) -> String {
    format!(
        "loss {:.4}  lr {:.2e}  {:.0} tokens/s  ETA {}",
        metrics.loss,
        metrics.learning_rate,
        metrics.tokens_per_s,
        HumanDuration(remaining)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::{Metrics, metrics::tests::train};

    #[test]
    fn a_step_shows_loss_rate_speed_and_time() {
        let Metrics::Train(metrics) = train(3, 1.25) else {
            unreachable!()
        };
        let line = step_line(&metrics, Duration::from_secs(90));
        assert_eq!(line, "loss 1.2500  lr 2.00e-4  812 tokens/s  ETA 2 minutes");
    }

    #[test]
    fn the_template_of_the_bar_is_valid() {
        assert!(ProgressStyle::with_template(BAR).is_ok());
    }
}
