//! GGUF, llama.cpp's file format: metadata, tokenizer and weights in one file, most of them quantized.

mod ggml_type;
mod llama;
mod metadata;
mod read;
mod write;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use serde_json::Value;

pub use ggml_type::GgmlType;
pub use metadata::{Metadata, MetadataValue};
use read::TensorEntry;
pub(crate) use write::{Value as WrittenValue, write};

use crate::{
    checkpoint::{MappedFile, StoredTensor, StoredType},
    error::{Error, Result},
};

/// Architectures (`general.architecture`) that can be read.
const ARCHITECTURES: [&str; 1] = ["llama"];

/// A mapped GGUF file whose header was read and checked.
pub struct GgufFile {
    path: PathBuf,
    file: MappedFile,
    bytes: Bytes,
    metadata: Metadata,
    tensors: Vec<TensorEntry>,
}

impl GgufFile {
    /// Maps a file and reads its header.
    ///
    /// # Errors
    /// When it cannot be read, or its header is truncated, corrupt, or names an element type unknown here.
    pub fn open(path: &Path) -> Result<GgufFile> {
        let file = MappedFile::open(path)?;
        let bytes = file.bytes();
        let header = read::read_header(&bytes).map_err(|message| Error::file(path, message))?;
        Ok(GgufFile {
            path: path.to_owned(),
            file,
            bytes,
            metadata: header.metadata,
            tensors: header.tensors,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the file says about its model.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The elements of a tensor as f32, by its name in the file.
    ///
    /// # Errors
    /// When there is no such tensor.
    pub fn tensor_f32(&self, name: &str) -> Result<Vec<f32>> {
        let entry = self.tensors.iter().find(|entry| entry.name == name);
        self.stored(entry.ok_or_else(|| Error::stored_tensor(&self.path, name, "is missing"))?)
            .to_f32(name)
    }

    /// The tensors' names with their extents, outermost first.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize])> {
        let entries = self.tensors.iter();
        entries.map(|entry| (&entry.name[..], &entry.shape[..]))
    }

    fn stored(&self, entry: &TensorEntry) -> StoredTensor {
        let bytes = self.bytes.slice(entry.start..entry.stop);
        let stored = StoredType::Ggml(entry.ggml);
        let mut tensor = StoredTensor::new(&self.path, entry.shape.clone(), stored, bytes);
        tensor.set_file(self.file.clone());
        tensor
    }

    /// Hugging Face's configuration, and the tensors by their Hugging Face names.
    pub(crate) fn to_hugging_face(&self) -> Result<(Value, BTreeMap<String, StoredTensor>)> {
        let bad = |message: String| Error::file(&self.path, message);
        let architecture = self.metadata.string("general.architecture").unwrap_or("");
        if !ARCHITECTURES.contains(&architecture) {
            let known = ARCHITECTURES.join(", ");
            return Err(bad(format!(
                "has the architecture \"{architecture}\", which cannot be read; known: {known}"
            )));
        }
        let mut rope_factors = None;
        let mut tensors = BTreeMap::new();
        for entry in &self.tensors {
            let tensor = self.stored(entry);
            if entry.name == "rope_freqs.weight" {
                rope_factors = Some(tensor.to_f32(&entry.name)?);
                continue;
            }
            let (name, order) = llama::tensor(&self.metadata, &entry.name)
                .map_err(bad)?
                .ok_or_else(|| {
                    Error::stored_tensor(
                        &self.path,
                        &entry.name,
                        format!("is unknown to the architecture {architecture}"),
                    )
                })?;
            let tensor = tensor
                .with_order(order)
                .map_err(|message| Error::stored_tensor(&self.path, &entry.name, message))?;
            tensors.insert(name, tensor);
        }
        let embedding = tensors
            .get("model.embed_tokens.weight")
            .ok_or_else(|| Error::stored_tensor(&self.path, "token_embd.weight", "is missing"))?;
        let vocab_size = embedding.info().shape.first().copied().unwrap_or(0);
        let tied = !tensors.contains_key("lm_head.weight");
        let biased = tensors.keys().any(|name| name.ends_with("_proj.bias"));
        let config = llama::config(
            &self.metadata,
            vocab_size,
            tied,
            biased,
            rope_factors.as_deref(),
        )
        .map_err(bad)?;
        Ok((config, tensors))
    }
}
