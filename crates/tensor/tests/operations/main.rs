//! The fast operations against the f64 reference on random, ragged shapes: forward passes directly, backward
//! passes by finite differences.

mod adamw_8bit;
mod backward;
mod forward;
mod refusals;
mod sample;
