//! Set-up and developer tasks.
fn main() {}
