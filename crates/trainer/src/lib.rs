//! The trainer: data, schedules, the training run, its records, and the definition of the command line.
#![deny(missing_docs)]

pub mod adapters;
pub mod base_model;
pub mod cli;
pub mod data;
pub mod evaluate;
pub mod interrupt;
pub mod machine;
pub mod mistake;
pub mod records;
pub mod schedule;
pub mod train;
