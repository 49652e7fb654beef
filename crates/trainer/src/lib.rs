//! The trainer: data, schedules, records, and the definition of the command line.
#![deny(missing_docs)]

pub mod cli;
pub mod data;
pub mod interrupt;
pub mod mistake;
pub mod records;
pub mod schedule;
