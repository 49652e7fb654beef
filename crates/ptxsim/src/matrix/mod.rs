//! Fragment layouts and arithmetic of PTX's matrix instructions, as pure functions.
