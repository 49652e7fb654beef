//! `fuselora merge`.

use std::io::{Write, stdout};
use std::path::Path;

use anyhow::Context;
use fuselora_tensor::Device;
use fuselora_trainer::base_model::BaseModel;
use fuselora_trainer::cli::MergeArgs;
use fuselora_trainer::data::DataFiles;
use fuselora_trainer::evaluate::{Evaluation, evaluate};
use fuselora_trainer::machine::{Machine, USUAL_DTYPE, open_device};
use fuselora_transformer::adapter::Adapter;
use fuselora_transformer::checkpoint::Checkpoint;
use fuselora_transformer::merge::{RequantizationError, merge_adapter, merge_requantized};
use fuselora_transformer::{families, model};

pub fn run(arguments: &MergeArgs) -> anyhow::Result<()> {
    let device = open_device(arguments.device)?;
    let checkpoint = Checkpoint::open(&arguments.model)?;
    let (family, config) = families::read_config(checkpoint.config())?;
    let modules = model::modules(family, &config);
    let adapter = Adapter::read(&arguments.adapter, &modules, &device)?;
    if arguments.requantize {
        return requantize(arguments, &checkpoint, &adapter, &device);
    }
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
            "{output} holds the merged checkpoint, in 16 bits because its base is in NF4; --requantize keeps it in NF4"
        )?,
        _ => writeln!(stdout(), "{output} holds the merged checkpoint")?,
    }
    Ok(())
}

fn requantize(
    arguments: &MergeArgs,
    checkpoint: &Checkpoint,
    adapter: &Adapter,
    device: &Device,
) -> anyhow::Result<()> {
    // Rows that cannot be read are found before the work, and the base is read before its folder may be replaced.
    let before = match &arguments.data {
        Some(_) => Some(loss(arguments, &arguments.model, true, device)?),
        None => None,
    };
    let errors = merge_requantized(checkpoint, adapter, &arguments.output)?;
    let mut out = stdout().lock();
    write!(out, "{}", table(&errors))?;
    if let Some(before) = before {
        let after = loss(arguments, &arguments.output, false, device)?;
        writeln!(
            out,
            "loss {:.4} with the adapter beside its base, {:.4} requantized ({:+.4}), over {} target tokens",
            before.loss,
            after.loss,
            after.loss - before.loss,
            after.target_tokens
        )?;
    }
    let output = arguments.output.display();
    writeln!(out, "{output} holds the merged checkpoint, in NF4")?;
    Ok(())
}

/// The loss of the model at `path` on the rows that are given.
fn loss(
    arguments: &MergeArgs,
    path: &Path,
    with_adapter: bool,
    device: &Device,
) -> anyhow::Result<Evaluation> {
    let data = arguments.data.as_deref().context("no rows are given")?;
    let file = DataFiles::find_held_out(data)?;
    let machine = Machine {
        device: device.clone(),
        dtype: USUAL_DTYPE,
        nf4: None,
    };
    let base = BaseModel::load(path, &machine)?;
    let lora = with_adapter
        .then(|| base.adapter(&arguments.adapter))
        .transpose()?;
    let (dataset, _) = base.dataset(&file, &arguments.rows, false)?;
    evaluate(&base.model, lora.as_ref(), &dataset.rows, 1)
}

/// A line for each weight. Errors are relative: to the merged weight, and to what the adapter has changed of it.
fn table(errors: &[RequantizationError]) -> String {
    const MODULE: &str = "module";
    let width = errors.iter().map(|error| error.module.len());
    let width = width.fold(MODULE.len(), usize::max);
    let mut text = format!("{MODULE:width$}  error / weight  error / update\n");
    for error in errors {
        let RequantizationError {
            module,
            of_weight,
            of_update,
        } = error;
        text += &format!("{module:width$}  {of_weight:14.4}  {of_update:14.3}\n");
    }
    text
}
