//! The arithmetic of PTX's scalar instructions, as pure functions.
