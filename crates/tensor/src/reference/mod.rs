//! The operations in plain f64, one obvious loop each: what tests hold the fast ones against.
