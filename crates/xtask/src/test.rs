//! Every test of the workspace.

use crate::{cargo, run as run_command, setup};
use anyhow::Result;

/// Provides the compilers, then runs `cargo test --workspace` with `arguments` added.
pub fn run(arguments: &[String]) -> Result<()> {
    setup::run()?;
    run_command(cargo().args(["test", "--workspace"]).args(arguments))
}
