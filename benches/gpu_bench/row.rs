//! What was found of a case: as a line to read, and as JSON for the report.

use crate::case::Case;
use crate::timing::Timed;
use anyhow::{Context, Result};
use fuselora_kernels::LaunchError;
use serde_json::{Value, json};
use std::fmt;
use std::path::Path;

/// Over the lines.
pub const HEAD: &str = "      us   range   TFLOP/s     GB/s  operation";

/// A case with its times, or with why there are none.
pub struct Row {
    group: &'static str,
    name: &'static str,
    shape: Vec<u32>,
    element: String,
    bytes: u64,
    flops: u64,
    found: Result<Timed, String>,
}

impl Row {
    pub fn new(group: &'static str, case: &Case, timed: Result<Timed>) -> Row {
        Row {
            group,
            name: case.name,
            shape: case.shape.clone(),
            element: case.element.to_string(),
            bytes: case.bytes,
            flops: case.flops,
            found: timed.map_err(|error| match error.downcast_ref() {
                // The launchers refuse a storage type that no kernel has been written for.
                Some(LaunchError::Element { .. }) => format!("not yet: {error:#}"),
                _ => format!("failed: {error:#}"),
            }),
        }
    }

    fn json(&self) -> Value {
        let mut row = json!({
            "group": self.group,
            "name": self.name,
            "shape": self.shape,
            "dtype": self.element,
            "bytes": self.bytes,
            "flops": self.flops,
        });
        match &self.found {
            Ok(timed) => {
                row["seconds"] = timed.median.into();
                row["range"] = timed.range.to_vec().into();
            }
            Err(why) => row["error"] = why.clone().into(),
        }
        row
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shape: Vec<String> = self.shape.iter().map(u32::to_string).collect();
        let operation = format!("{} {} {}", self.name, shape.join("x"), self.element);
        match &self.found {
            Ok(Timed { median, range }) => write!(
                f,
                "{:8.1} {:5.1} % {:9.1} {:8.0}  {operation}",
                1e6 * median,
                100.0 * (range[1] - range[0]) / median,
                self.flops as f64 / median / 1e12,
                self.bytes as f64 / median / 1e9,
            ),
            Err(why) => write!(f, "{:>34}  {operation}: {why}", "-"),
        }
    }
}

/// Writes all rows; the file appears whole.
pub fn write(path: &Path, rows: &[Row]) -> Result<()> {
    let rows: Vec<Value> = rows.iter().map(Row::json).collect();
    let partial = path.with_extension("partial");
    std::fs::write(&partial, format!("{:#}\n", Value::Array(rows)))
        .and_then(|()| std::fs::rename(&partial, path))
        .with_context(|| format!("cannot write {}", path.display()))
}
