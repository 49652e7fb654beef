//! Training data: JSONL files become rows of tokens with a target at each position that has one.
//!
//! A line is parsed into a [`Record`], encoded into a [`Row`], and rows are drawn in the order of a
//! [`Sampler`] and concatenated into a [`PackedBatch`]. The shift to the next token is done once, in
//! [`Row`]; nothing after it shifts.

mod batch;
mod dataset;
mod encode;
mod files;
mod record;
mod row;
mod sampler;

pub use batch::PackedBatch;
pub use dataset::{Dataset, Limits};
pub use encode::{Encode, Encoding, Passage};
pub use files::DataFiles;
pub use record::{FieldNames, Record};
pub use row::Row;
pub use sampler::{Position, Sampler};
