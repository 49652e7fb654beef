//! `fuselora adapter diff`.

use std::io::{Write, stdout};

use fuselora_trainer::cli::DiffArgs;
use fuselora_transformer::adapter::{Adapter, ModuleDifference, diff};
use serde_json::{Map, Value, json};

use super::adapted_model;

pub fn run(arguments: &DiffArgs) -> anyhow::Result<()> {
    let model = adapted_model(&arguments.model)?;
    let (one, other) = (
        model.read_adapter(&arguments.first)?,
        model.read_adapter(&arguments.second)?,
    );
    let keys = different_keys(&one, &other);
    let modules = diff(&one, &other)?;
    let mut out = stdout().lock();
    if arguments.json {
        let configuration: Map<_, _> = keys
            .into_iter()
            .map(|(key, pair)| (key, Value::from(pair.to_vec())))
            .collect();
        let modules: Vec<Value> = modules.iter().map(as_json).collect();
        writeln!(
            out,
            "{}",
            json!({ "configuration": configuration, "modules": modules })
        )?;
        return Ok(());
    }
    for (key, [one, other]) in &keys {
        writeln!(out, "{key}: {one}, {other}")?;
    }
    write!(out, "{}", table(&modules))?;
    let same = modules
        .iter()
        .filter(|module| module.relative() == 0.0)
        .count();
    writeln!(out, "{same} of {} are the same", modules.len())?;
    Ok(())
}

/// Keys of the configurations with other values, and these.
fn different_keys(one: &Adapter, other: &Adapter) -> Vec<(String, [Value; 2])> {
    let (Value::Object(one), Value::Object(mut other)) =
        (one.config.to_json(), other.config.to_json())
    else {
        return Vec::new();
    };
    let mut different = Vec::new();
    for (key, value) in one {
        let beside = other.remove(&key).unwrap_or(Value::Null);
        if value != beside {
            different.push((key, [value, beside]));
        }
    }
    different.extend(
        other
            .into_iter()
            .map(|(key, value)| (key, [Value::Null, value])),
    );
    different
}

fn as_json(module: &ModuleDifference) -> Value {
    json!({
        "module": module.module,
        "first": module.first,
        "second": module.second,
        "difference": module.difference,
        "relative": module.relative(),
    })
}

/// A line for each module, the most different first.
fn table(modules: &[ModuleDifference]) -> String {
    const MODULE: &str = "module";
    let width = modules.iter().map(|module| module.module.chars().count());
    let width = width.fold(MODULE.len(), usize::max);
    let mut sorted: Vec<&ModuleDifference> = modules.iter().collect();
    sorted.sort_by(|a, b| b.relative().total_cmp(&a.relative()));
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.4e}"));
    let mut text = format!(
        "{MODULE:width$}  {:>11}  {:>11}  {:>10}\n",
        "first", "second", "difference"
    );
    for module in sorted {
        let (first, second) = (number(module.first), number(module.second));
        let relative = module.relative();
        let name = &module.module;
        text += &format!("{name:width$}  {first:>11}  {second:>11}  {relative:10.2e}\n");
    }
    text
}
