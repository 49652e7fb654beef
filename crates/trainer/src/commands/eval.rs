//! `fuselora eval`.

use std::io::{Write, stdout};

use anyhow::Context;
use fuselora_trainer::adapters::Adapters;
use fuselora_trainer::base_model::BaseModel;
use fuselora_trainer::cli::EvalArgs;
use fuselora_trainer::data::{DataFiles, FieldNames};
use fuselora_trainer::evaluate::evaluate_mixed;
use fuselora_trainer::machine::Machine;

pub fn run(arguments: &EvalArgs) -> anyhow::Result<()> {
    let file = DataFiles::find_held_out(&arguments.data)?;
    let base = BaseModel::load(&arguments.model, &Machine::open(&arguments.machine)?)?;
    let adapters = Adapters::load(&base, &arguments.adapter)?;
    let fields = FieldNames {
        adapter: adapters
            .are_several()
            .then(|| arguments.adapter_field.clone()),
        ..arguments.rows.field_names()
    };
    let (dataset, limits) = base.dataset_of(&file, &fields, &arguments.rows, false)?;
    eprintln!("{}: {}", file.display(), dataset.summary(limits));
    let rows = dataset
        .rows
        .iter()
        .map(|row| Ok((row, adapters.of(row.adapter())?)))
        .collect::<anyhow::Result<Vec<_>>>()
        .with_context(|| {
            let field = &arguments.adapter_field;
            format!("{}: a row's `{field}`", file.display())
        })?;
    let found = evaluate_mixed(&base.model, &rows, arguments.batch_size)?;
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
