//! `fuselora adapter list`.

use std::fs;
use std::io::{Write, stdout};
use std::path::{Path, PathBuf};

use anyhow::Context;
use fuselora_trainer::cli::ListArgs;
use fuselora_trainer::mistake;
use fuselora_transformer::adapter::AdapterSummary;
use serde_json::{Value, json};

pub fn run(arguments: &ListArgs) -> anyhow::Result<()> {
    let mut found = Vec::new();
    for path in &arguments.paths {
        if let Some(summary) = AdapterSummary::read(path)? {
            found.push((path.clone(), summary));
            continue;
        }
        if !path.is_dir() {
            return Err(mistake!(
                "{} is no adapter: give a folder of PEFT or mlx-lm, a GGUF adapter, or a folder of these",
                path.display()
            ));
        }
        for inside in entries(path)? {
            match AdapterSummary::read(&inside) {
                Ok(Some(summary)) => found.push((inside, summary)),
                Ok(None) => {}
                // The others are listed all the same.
                Err(error) => eprintln!("{}: {error}", inside.display()),
            }
        }
    }
    let mut out = stdout().lock();
    if arguments.json {
        let all: Vec<Value> = found.iter().map(|(path, own)| as_json(path, own)).collect();
        writeln!(out, "{}", Value::from(all))?;
    } else if found.is_empty() {
        writeln!(out, "no adapters")?;
    } else {
        write!(out, "{}", table(&found))?;
    }
    Ok(())
}

/// What a folder holds, by name.
fn entries(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let failed = || format!("{} cannot be read", folder.display());
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).with_context(failed)? {
        paths.push(entry.with_context(failed)?.path());
    }
    paths.sort();
    Ok(paths)
}

fn as_json(path: &Path, summary: &AdapterSummary) -> Value {
    json!({
        "path": path,
        "format": summary.format.to_string(),
        "kind": summary.kind,
        "rank": summary.rank,
        "alpha": summary.alpha,
        "modules": summary.modules,
        "parameters": summary.parameters,
        "targets": summary.targets,
        "base_model": summary.base_model,
    })
}

/// A line for each adapter, columns as wide as they need.
fn table(found: &[(PathBuf, AdapterSummary)]) -> String {
    let head = [
        "adapter",
        "format",
        "kind",
        "rank",
        "alpha",
        "modules",
        "parameters",
        "targets",
        "base model",
    ];
    let mut lines = vec![head.map(str::to_owned)];
    lines.extend(found.iter().map(|(path, own)| {
        [
            path.display().to_string(),
            own.format.to_string(),
            own.kind.to_owned(),
            own.rank.to_string(),
            own.alpha.to_string(),
            own.modules.to_string(),
            own.parameters.to_string(),
            own.targets.clone(),
            own.base_model.clone().unwrap_or_default(),
        ]
    }));
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max();
    let widths: Vec<usize> = (0..head.len())
        .map(|column| width(column).unwrap_or(0))
        .collect();
    let line = |line: &[String; 9]| {
        let cells = line.iter().zip(&widths).enumerate();
        let cells: Vec<String> = cells
            .map(|(column, (cell, &width))| match column {
                3..=6 => format!("{cell:>width$}"),
                _ => format!("{cell:width$}"),
            })
            .collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    lines.iter().map(line).collect()
}
