//! Learning-rate schedules, as `transformers.optimization.get_*_schedule` defines them.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// How the learning rate goes on after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LrScheduler {
    /// Stays at its peak.
    #[value(alias = "constant_with_warmup", help = None::<&str>)]
    Constant,
    #[value(help = None::<&str>)]
    /// Falls in a straight line to 0 at the last step.
    Linear,
    #[value(help = None::<&str>)]
    /// Falls along half a cosine to 0 at the last step.
    Cosine,
}

/// The learning rate of every step of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The course after warm-up.
    pub scheduler: LrScheduler,
    /// The highest learning rate.
    pub peak: f64,
    /// Steps over which the rate rises from 0 to `peak`.
    pub warmup_steps: u64,
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
}

impl Schedule {
    /// The learning rate of the optimizer step with index `step`, counted from 0.
    ///
    /// With warm-up the first step has a rate of 0, as in transformers.
    pub fn learning_rate(&self, step: u64) -> f64 {
        let warmup = self.warmup_steps;
        if step < warmup {
            return self.peak * step as f64 / warmup as f64;
        }
        let span = self.total_steps.saturating_sub(warmup).max(1) as f64;
        let factor = match self.scheduler {
            LrScheduler::Constant => 1.0,
            LrScheduler::Linear => self.total_steps.saturating_sub(step) as f64 / span,
            LrScheduler::Cosine => 0.5 * (1.0 + (PI * (step - warmup) as f64 / span).cos()),
        };
        self.peak * factor
    }
}

/// The steps of warm-up: `steps` where it is not 0, otherwise the share `ratio` of all steps, rounded up.
pub fn warmup_steps(steps: u64, ratio: f64, total_steps: u64) -> u64 {
    if steps > 0 {
        steps
    } else {
        (ratio * total_steps as f64).ceil() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Case {
        scheduler: LrScheduler,
        peak: f64,
        warmup_steps: u64,
        total_steps: u64,
        learning_rates: Vec<f64>,
    }

    #[derive(Deserialize)]
    struct Cases {
        cases: Vec<Case>,
    }

    #[test]
    fn the_rates_are_those_of_transformers() {
        let cases: Cases =
            serde_json::from_str(include_str!("../tests/data/schedules.json")).unwrap();
        assert!(!cases.cases.is_empty());
        for case in cases.cases {
            let Case {
                scheduler,
                peak,
                warmup_steps,
                total_steps,
                learning_rates,
            } = case;
            let schedule = Schedule {
                scheduler,
                peak,
                warmup_steps,
                total_steps,
            };
            // Beyond the last step transformers lets the cosine rise again; no run gets there.
            for (step, &expected) in learning_rates
                .iter()
                .enumerate()
                .take(total_steps as usize + 1)
            {
                let got = schedule.learning_rate(step as u64);
                assert!(
                    (got - expected).abs() <= 1e-12 * peak,
                    "{schedule:?}, step {step}: {got}, not {expected}"
                );
            }
        }
    }

    #[test]
    fn warmup_by_steps_or_by_share() {
        assert_eq!(warmup_steps(5, 0.5, 100), 5);
        assert_eq!(warmup_steps(0, 0.03, 101), 4);
        assert_eq!(warmup_steps(0, 0.0, 100), 0);
    }
}
