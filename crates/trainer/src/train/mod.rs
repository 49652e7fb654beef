//! The training run: from a configuration to an adapter, its records and its report.

mod adapter;
mod answers;
mod graphs;
mod learning_rates;
mod optimizer;
mod run;
mod saved_state;

pub use adapter::peft_config;
pub use run::{Outcome, run};
