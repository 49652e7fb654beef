//! `fuselora logits`.

use std::io::{Write, stdout};

use anyhow::Context;
use fuselora_tensor::DType;
use fuselora_trainer::base_model::BaseModel;
use fuselora_trainer::cli::LogitsArgs;
use fuselora_trainer::data::{DataFiles, PackedBatch};
use fuselora_trainer::evaluate::to_device;
use fuselora_trainer::machine::Machine;
use fuselora_trainer::mistake;
use fuselora_transformer::checkpoint::{TensorSpec, write_safetensors};
use fuselora_transformer::lora::Pass;

pub fn run(arguments: &LogitsArgs) -> anyhow::Result<()> {
    let file = DataFiles::find_held_out(&arguments.data)?;
    let base = BaseModel::load(&arguments.model, &Machine::open(&arguments.machine)?)?;
    let lora = arguments
        .adapter
        .as_deref()
        .map(|folder| base.adapter(folder))
        .transpose()?;
    let (dataset, _) = base.dataset(&file, &arguments.rows, false)?;
    let rows = dataset.rows.get(..arguments.row_count).ok_or_else(|| {
        mistake!(
            "{} has {} rows, fewer than --rows {}",
            file.display(),
            dataset.rows.len(),
            arguments.row_count
        )
    })?;
    let specs: Vec<TensorSpec> = rows
        .iter()
        .enumerate()
        .map(|(index, row)| TensorSpec {
            name: format!("row.{index}"),
            shape: vec![row.tokens().len(), base.model.config().vocab_size],
            dtype: DType::F32,
        })
        .collect();
    let pass = Pass {
        lora: lora.as_ref(),
        ..Pass::default()
    };
    write_safetensors(&arguments.output, &specs, |spec| {
        // The writer asks by name; names are made just above.
        let row = specs
            .iter()
            .position(|known| known.name == spec.name)
            .unwrap_or_default();
        let packed = PackedBatch::pack([&rows[row]]);
        let batch = to_device(&base.model, &packed)
            .map_err(|error| fuselora_transformer::Error::Input(error.to_string()))?;
        Ok(base.model.logits(&batch, &pass)?.to_bytes()?)
    })
    .with_context(|| format!("{} cannot be written", arguments.output.display()))?;
    writeln!(
        stdout(),
        "{} holds the logits of {} rows",
        arguments.output.display(),
        rows.len()
    )?;
    Ok(())
}
