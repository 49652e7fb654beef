//! A whole file of rows, checked and counted.

use std::{fs, path::Path};

use anyhow::Context;
use rayon::prelude::*;

use super::{Encoding, FieldNames, Record, Row};
use crate::mistake;

/// What the model can take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Longer rows keep their beginning.
    pub max_seq_length: usize,
    /// Ids from here on do not exist.
    pub vocab_size: usize,
}

/// The rows of one file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dataset {
    /// The rows, in file order.
    pub rows: Vec<Row>,
    /// How many rows were longer than the limit and keep only their beginning.
    pub truncated: usize,
    /// How many rows had no target within the limit and were left out.
    pub dropped: usize,
}

impl Dataset {
    /// Reads a JSONL file; blank lines are skipped.
    ///
    /// A row longer than `limits.max_seq_length` keeps its beginning, as in TRL and mlx-lm; one whose targets
    /// all lie beyond is left out. Both are counted, and [`Dataset::summary`] says so.
    ///
    /// # Errors
    /// A [`mistake::Mistake`] that names file and line: malformed JSON, a wrong or empty field, a row without
    /// target tokens, an id outside of the vocabulary. An I/O error with the path.
    pub fn load(
        path: &Path,
        fields: &FieldNames,
        encoding: &Encoding,
        limits: Limits,
    ) -> anyhow::Result<Dataset> {
        let bytes = fs::read(path).with_context(|| format!("{} cannot be read", path.display()))?;
        let text = std::str::from_utf8(&bytes).map_err(|_| {
            mistake!(
                "{} is not UTF-8 text: the data must be JSONL, one object per line",
                path.display()
            )
        })?;
        let text = text.trim_start_matches('\u{feff}');
        let lines: Vec<(usize, &str)> = text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty())
            .collect();
        let rows: Vec<Row> = lines
            .par_iter()
            .map(|&(index, line)| {
                row(line, fields, encoding, limits)
                    .with_context(|| format!("{}, line {}", path.display(), index + 1))
            })
            // All results are kept until here so that the first bad line is the one reported, whatever the threads do.
            .collect::<Vec<_>>()
            .into_iter()
            .collect::<anyhow::Result<_>>()?;
        let read = rows.len();
        let mut dataset = Dataset::default();
        for mut row in rows {
            if row.tokens().len() > limits.max_seq_length {
                row.truncate(limits.max_seq_length);
                if row.target_count() == 0 {
                    dataset.dropped += 1;
                    continue;
                }
                dataset.truncated += 1;
            }
            dataset.rows.push(row);
        }
        if read == 0 {
            return Err(mistake!("{} has no rows", path.display()));
        }
        if dataset.rows.is_empty() {
            return Err(mistake!(
                "{}: no row has a target within its first {} tokens; raise --max-seq-length",
                path.display(),
                limits.max_seq_length
            ));
        }
        Ok(dataset)
    }

    /// Tokens of all rows.
    pub fn token_count(&self) -> usize {
        self.rows.iter().map(|row| row.tokens().len()).sum()
    }

    /// Target tokens of all rows.
    pub fn target_count(&self) -> usize {
        self.rows.iter().map(Row::target_count).sum()
    }

    /// One line for the user: how much there is, and what became of rows that were too long.
    pub fn summary(&self, limits: Limits) -> String {
        let mut summary = format!(
            "{} rows, {} tokens, of which {} are targets",
            self.rows.len(),
            self.token_count(),
            self.target_count()
        );
        if self.truncated > 0 {
            summary += &format!(
                "; {} cut to --max-seq-length {}",
                self.truncated, limits.max_seq_length
            );
        }
        if self.dropped > 0 {
            summary += &format!(
                "; {} left out, as their targets lie beyond it",
                self.dropped
            );
        }
        summary
    }
}

fn row(
    line: &str,
    fields: &FieldNames,
    encoding: &Encoding,
    limits: Limits,
) -> anyhow::Result<Row> {
    let row = encoding
        .row(Record::parse(line, fields)?)?
        .with_adapter(fields.adapter_of(line)?);
    let ids = row.tokens().iter().chain(row.targets().iter().flatten());
    if let Some(id) = ids
        .into_iter()
        .find(|&&id| id as usize >= limits.vocab_size)
    {
        return Err(mistake!(
            "token {id} is outside of the model's vocabulary of {}: the row, or the tokenizer, belongs to another model",
            limits.vocab_size
        ));
    }
    if row.target_count() == 0 {
        return Err(mistake!(
            "the row has no target tokens, so there is nothing to learn"
        ));
    }
    Ok(row)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mistake::exit_code;

    const LIMITS: Limits = Limits {
        max_seq_length: 4,
        vocab_size: 10,
    };

    fn load(content: impl AsRef<[u8]>) -> anyhow::Result<Dataset> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        fs::write(&path, content).unwrap();
        let encoding = Encoding {
            tokenizer: None,
            chat_template: true,
            mask_prompt: true,
            end_text: true,
        };
        Dataset::load(&path, &FieldNames::default(), &encoding, LIMITS)
    }

    #[test]
    fn long_rows_are_cut_or_left_out_and_counted() {
        let dataset = load(concat!(
            "{\"input_ids\": [1, 2, 3]}\r\n\n",
            "{\"input_ids\": [1, 2, 3, 4, 5]}\n",
            "{\"input_ids\": [1, 2, 3, 4, 5], \"labels\": [-100, -100, -100, -100, 5]}",
        ))
        .unwrap();
        let lengths: Vec<usize> = dataset.rows.iter().map(|row| row.tokens().len()).collect();
        assert_eq!(lengths, [3, 4]);
        assert_eq!(
            (dataset.truncated, dataset.dropped, dataset.target_count()),
            (1, 1, 5)
        );
        assert_eq!(
            dataset.summary(LIMITS),
            "2 rows, 7 tokens, of which 5 are targets; 1 cut to --max-seq-length 4; \
             1 left out, as their targets lie beyond it"
        );
    }

    #[test]
    fn errors_name_file_and_line() {
        let good = "{\"input_ids\": [1, 2]}";
        let cases = [
            (
                format!("{good}\n{{\"input_ids\": \n"),
                "rows.jsonl, line 2: malformed JSON",
            ),
            (
                format!("\n{good}\n{{}}\n{{}}"),
                "rows.jsonl, line 3: the row has no fields",
            ),
            (
                "{\"input_ids\": [1]}".to_string(),
                "line 1: the row has no target tokens",
            ),
            (
                "{\"input_ids\": [1, 2], \"labels\": [1, -100]}".to_string(),
                "line 1: the row has no target tokens",
            ),
            (
                "{\"input_ids\": [1, 10]}".to_string(),
                "line 1: token 10 is outside of the model's vocabulary of 10",
            ),
            (
                "{\"input_ids\": [1, 2], \"labels\": [1, 11]}".to_string(),
                "line 1: token 11 is outside",
            ),
            (
                "{\"text\": \"a\"}".to_string(),
                "line 1: the row is text and the model has no tokenizer",
            ),
            (" \n\n".to_string(), "rows.jsonl has no rows"),
            (
                "{\"input_ids\": [1, 2, 3, 4, 5], \"labels\": [-100, -100, -100, -100, 5]}"
                    .to_string(),
                "rows.jsonl: no row has a target within its first 4 tokens; raise --max-seq-length",
            ),
        ];
        for (content, expected) in cases {
            let error = load(&content).unwrap_err();
            assert_eq!(exit_code(&error), 2);
            let message = format!("{error:#}");
            assert!(message.contains(expected), "{content}: {message}");
        }
    }

    #[test]
    fn binary_files_and_missing_files() {
        let message = load([0xff, 0xfe, 0x00]).unwrap_err().to_string();
        assert!(message.contains("is not UTF-8 text"), "{message}");
        let encoding = Encoding {
            tokenizer: None,
            chat_template: true,
            mask_prompt: true,
            end_text: true,
        };
        let missing = Dataset::load(
            Path::new("/nowhere.jsonl"),
            &FieldNames::default(),
            &encoding,
            LIMITS,
        );
        let error = missing.unwrap_err();
        assert_eq!(exit_code(&error), 2);
        assert!(
            format!("{error:#}").starts_with("/nowhere.jsonl cannot be read: No such file"),
            "{error:#}"
        );
    }
}
