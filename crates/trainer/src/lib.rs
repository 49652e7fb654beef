//! The trainer and the fuselora program.
#![deny(missing_docs)]
