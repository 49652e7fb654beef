//! `fuselora merge`.

use std::io::{Write, stdout};

use fuselora_trainer::cli::MergeArgs;
use fuselora_trainer::machine::open_device;
use fuselora_transformer::adapter::Adapter;
use fuselora_transformer::checkpoint::Checkpoint;
use fuselora_transformer::merge::merge_adapter;
use fuselora_transformer::{families, model};

pub fn run(arguments: &MergeArgs) -> anyhow::Result<()> {
    let device = open_device(arguments.device)?;
    let checkpoint = Checkpoint::open(&arguments.model)?;
    let (family, config) = families::read_config(checkpoint.config())?;
    let modules = model::modules(family, &config);
    let adapter = Adapter::read(&arguments.adapter, &modules, &device)?;
    merge_adapter(
        &checkpoint,
        &adapter,
        &arguments.output,
        arguments.dtype.map(Into::into),
    )?;
    let output = arguments.output.display();
    match (arguments.dtype, checkpoint.nf4_source_dtype()) {
        (None, Some(_)) => writeln!(
            stdout(),
            "{output} holds the merged checkpoint, in 16 bits because its base is in NF4"
        )?,
        _ => writeln!(stdout(), "{output} holds the merged checkpoint")?,
    }
    Ok(())
}
