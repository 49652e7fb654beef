//! `fuselora eval`.

use std::io::{Write, stdout};

use fuselora_trainer::base_model::BaseModel;
use fuselora_trainer::cli::EvalArgs;
use fuselora_trainer::data::DataFiles;
use fuselora_trainer::evaluate::evaluate;
use fuselora_trainer::machine::Machine;

pub fn run(arguments: &EvalArgs) -> anyhow::Result<()> {
    let file = DataFiles::find_held_out(&arguments.data)?;
    let base = BaseModel::load(&arguments.model, &Machine::open(&arguments.machine)?)?;
    let lora = arguments
        .adapter
        .as_deref()
        .map(|folder| base.adapter(folder))
        .transpose()?;
    let (dataset, limits) = base.dataset(&file, &arguments.rows, false)?;
    eprintln!("{}: {}", file.display(), dataset.summary(limits));
    let found = evaluate(
        &base.model,
        lora.as_ref(),
        &dataset.rows,
        arguments.batch_size,
    )?;
    let mut out = stdout().lock();
    if arguments.json {
        writeln!(out, "{}", serde_json::to_string(&found)?)?;
    } else {
        writeln!(
            out,
            "loss {:.4}, perplexity {:.2}, over {} target tokens",
            found.loss, found.perplexity, found.target_tokens
        )?;
    }
    Ok(())
}
