//! `fuselora adapter`.

mod combine;
mod diff;
mod list;

use std::io::{Write, stdout};
use std::path::Path;

use anyhow::Context;
use fuselora_trainer::cli::{AdapterArgs, AdapterCommand, ConvertAdapterArgs};
use fuselora_trainer::mistake;
use fuselora_transformer::adapter::{AdaptedModel, AdapterFormat};
use fuselora_transformer::checkpoint::Checkpoint;

pub fn run(arguments: &AdapterArgs) -> anyhow::Result<()> {
    match &arguments.command {
        AdapterCommand::List(arguments) => list::run(arguments),
        AdapterCommand::Combine(arguments) => combine::run(arguments),
        AdapterCommand::Convert(arguments) => run_convert(arguments),
        AdapterCommand::Diff(arguments) => diff::run(arguments),
    }
}

/// What adapters of the model at `path` change.
fn adapted_model(path: &Path) -> anyhow::Result<AdaptedModel> {
    let checkpoint = Checkpoint::open(path)?;
    let model = AdaptedModel::of(&checkpoint);
    model.with_context(|| format!("{} cannot be read", path.display()))
}

fn run_convert(arguments: &ConvertAdapterArgs) -> anyhow::Result<()> {
    let model = adapted_model(&arguments.model)?;
    let adapter = model.read_adapter(&arguments.adapter)?;
    let (format, output) = (AdapterFormat::from(arguments.to), &arguments.output);
    if format == AdapterFormat::Gguf && output.is_dir() {
        return Err(mistake!(
            "{} is a folder; give --output the name of a file for gguf",
            output.display()
        ));
    }
    model.write_adapter(&adapter, format, output, arguments.dtype.into())?;
    writeln!(
        stdout(),
        "{} holds the adapter in the format of {format}: {} modules",
        output.display(),
        adapter.modules.len()
    )?;
    Ok(())
}
