//! `fuselora adapter`.

use std::io::{Write, stdout};

use fuselora_tensor::Device;
use fuselora_trainer::cli::{AdapterArgs, AdapterCommand, CombinationArg, CombineArgs};
use fuselora_trainer::mistake;
use fuselora_transformer::adapter::{Adapter, combine};
use fuselora_transformer::checkpoint::Checkpoint;
use fuselora_transformer::{families, model};

pub fn run(arguments: &AdapterArgs) -> anyhow::Result<()> {
    match &arguments.command {
        AdapterCommand::Combine(arguments) => run_combine(arguments),
    }
}

fn run_combine(arguments: &CombineArgs) -> anyhow::Result<()> {
    let (folders, weights) = (&arguments.adapter, &arguments.weights);
    if folders.len() != weights.len() {
        return Err(mistake!(
            "--weights has {} numbers for {} adapters; give one for each --adapter",
            weights.len(),
            folders.len()
        ));
    }
    if arguments.svd_rank.is_some() && arguments.combination_type != CombinationArg::Svd {
        return Err(mistake!(
            "--svd-rank is for --combination-type svd alone; leave it out"
        ));
    }
    let checkpoint = Checkpoint::open(&arguments.model)?;
    let (family, config) = families::read_config(checkpoint.config())?;
    let modules = model::modules(family, &config);
    let mut adapters = Vec::with_capacity(folders.len());
    for (folder, weight) in folders.iter().zip(weights) {
        adapters.push((Adapter::read(folder, &modules, &Device::cpu())?, *weight));
    }
    let combined = combine(&adapters, arguments.combination())?;
    combined.write(&arguments.output)?;
    writeln!(
        stdout(),
        "{} holds the combined adapter, of rank {}",
        arguments.output.display(),
        combined.config.rank
    )?;
    Ok(())
}
