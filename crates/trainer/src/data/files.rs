//! Where the data lies: a file, or a folder with train.jsonl, valid.jsonl and test.jsonl.

use std::path::{Path, PathBuf};

use crate::mistake;

/// The files that `--data` and `--eval-data` stand for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFiles {
    /// Rows to learn from.
    pub train: PathBuf,
    /// Held-out rows for evaluation during training.
    pub valid: Option<PathBuf>,
}

impl DataFiles {
    /// Finds the files of a training run. `data` is a JSONL file or a folder with train.jsonl and perhaps
    /// valid.jsonl; `eval_data` is a file or a folder with valid.jsonl, and wins over `data`'s own.
    ///
    /// # Errors
    /// A [`mistake::Mistake`] that names what is missing.
    pub fn find(data: &Path, eval_data: Option<&Path>) -> anyhow::Result<DataFiles> {
        let train = choose(data, &["train.jsonl"])?;
        let valid = match eval_data {
            Some(path) => Some(choose(path, &["valid.jsonl", "test.jsonl"])?),
            None => Some(data.join("valid.jsonl")).filter(|path| path.is_file()),
        };
        Ok(DataFiles { train, valid })
    }

    /// Finds the file that `eval` and `logits` read: a JSONL file, or a folder with test.jsonl, valid.jsonl
    /// or train.jsonl, the first of them that exists.
    ///
    /// # Errors
    /// A [`mistake::Mistake`] that names what is missing.
    pub fn find_held_out(data: &Path) -> anyhow::Result<PathBuf> {
        choose(data, &["test.jsonl", "valid.jsonl", "train.jsonl"])
    }
}

/// `path` itself where it is a file, or the first of `names` that exists in the folder `path`.
fn choose(path: &Path, names: &[&str]) -> anyhow::Result<PathBuf> {
    if path.is_dir() {
        let candidates = names.iter().map(|name| path.join(name));
        return candidates
            .into_iter()
            .find(|file| file.is_file())
            .ok_or_else(|| {
                mistake!(
                    "the folder {} has no {}",
                    path.display(),
                    names.join(" or ")
                )
            });
    }
    if !path.exists() {
        return Err(mistake!(
            "there is no data at {}: give a JSONL file, or a folder with {}",
            path.display(),
            names[0]
        ));
    }
    Ok(path.to_path_buf())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn folders_and_files() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let message = DataFiles::find(root, None).unwrap_err().to_string();
        assert!(message.ends_with("has no train.jsonl"), "{message}");
        for name in ["train.jsonl", "test.jsonl", "other.jsonl"] {
            fs::write(root.join(name), "{}").unwrap();
        }
        let found = DataFiles::find(root, None).unwrap();
        assert_eq!(
            found,
            DataFiles {
                train: root.join("train.jsonl"),
                valid: None
            }
        );
        fs::write(root.join("valid.jsonl"), "{}").unwrap();
        let found = DataFiles::find(root, None).unwrap();
        assert_eq!(found.valid, Some(root.join("valid.jsonl")));
        let found =
            DataFiles::find(&root.join("other.jsonl"), Some(&root.join("test.jsonl"))).unwrap();
        assert_eq!(
            found,
            DataFiles {
                train: root.join("other.jsonl"),
                valid: Some(root.join("test.jsonl"))
            }
        );
        assert_eq!(
            DataFiles::find_held_out(root).unwrap(),
            root.join("test.jsonl")
        );
    }

    #[test]
    fn a_missing_path_is_named() {
        let message = DataFiles::find_held_out(Path::new("/nowhere/rows.jsonl"))
            .unwrap_err()
            .to_string();
        assert!(message.contains("/nowhere/rows.jsonl"), "{message}");
    }
}
