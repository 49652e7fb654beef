//! `fuselora convert`.

use std::io::{Write, stdout};

use fuselora_trainer::cli::ConvertArgs;
use fuselora_transformer::{checkpoint::Checkpoint, convert::gguf_to_hugging_face};

pub fn run(arguments: &ConvertArgs) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&arguments.model)?;
    gguf_to_hugging_face(&checkpoint, &arguments.output, arguments.dtype.into())?;
    writeln!(
        stdout(),
        "{} holds the checkpoint",
        arguments.output.display()
    )?;
    Ok(())
}
