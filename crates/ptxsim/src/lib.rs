//! Runs PTX on the CPU under checks stricter than a GPU's.
#![deny(missing_docs)]
