//! `fuselora adapter combine`.

use std::io::{Write, stdout};

use fuselora_tensor::Device;
use fuselora_trainer::cli::{CombinationArg, CombineArgs};
use fuselora_trainer::mistake;
use fuselora_transformer::adapter::{Adapter, combine};

use super::adapted_model;

pub fn run(arguments: &CombineArgs) -> anyhow::Result<()> {
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
    let model = adapted_model(&arguments.model)?;
    let mut adapters = Vec::with_capacity(folders.len());
    for (folder, weight) in folders.iter().zip(weights) {
        let adapter = Adapter::read(folder, model.modules(), &Device::cpu())?;
        adapters.push((adapter, *weight));
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
