//! `fuselora quantize`.

use std::io::{Write, stdout};

use fuselora_trainer::cli::QuantizeArgs;
use fuselora_transformer::{checkpoint::Checkpoint, quantize::quantize_checkpoint};

pub fn run(arguments: &QuantizeArgs) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&arguments.model)?;
    quantize_checkpoint(
        &checkpoint,
        &arguments.output,
        &arguments.nf4.options(),
        arguments.dtype.map(Into::into),
        arguments.bnb_4bit_compute_dtype.into(),
    )?;
    writeln!(
        stdout(),
        "{} holds the checkpoint",
        arguments.output.display()
    )?;
    Ok(())
}
