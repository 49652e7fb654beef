//! Writing safetensors tensor by tensor, so that memory is bounded by the largest one.

use std::{io::Write, path::Path};

use fuselora_tensor::DType;
use serde_json::{Map, Value, json};

use crate::{
    atomic_file,
    error::{Error, Result},
};

/// Bytes of tensors after which a new shard begins, as transformers does by default.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// A tensor that is going to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the file.
    pub name: String,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// The type of its elements.
    pub dtype: DType,
}

impl TensorSpec {
    /// Bytes that the elements take.
    pub fn size_in_bytes(&self) -> u64 {
        self.shape
            .iter()
            .map(|&extent| extent as u64)
            .product::<u64>()
            * self.dtype.size_in_bytes() as u64
    }
}

/// Whether a file of this name holds a checkpoint's weights, or is their index: what [`write_weights`] writes.
pub fn is_weight_file(name: &str) -> bool {
    name == "model.safetensors.index.json"
        || name.starts_with("model") && name.ends_with(".safetensors")
}

/// Writes one safetensors file at `path`, with `contents` asked for each tensor's little-endian bytes in
/// turn. The tensors lie in the order of the `safetensors` library: by falling element size, then by name.
///
/// # Errors
/// An error of `contents`, bytes that do not fit the spec, or a file that cannot be written.
pub fn write_safetensors(
    path: &Path,
    tensors: &[TensorSpec],
    mut contents: impl FnMut(&TensorSpec) -> Result<Vec<u8>>,
) -> Result<()> {
    let mut tensors: Vec<&TensorSpec> = tensors.iter().collect();
    tensors.sort_by(|a, b| {
        rank(a.dtype)
            .cmp(&rank(b.dtype))
            .then_with(|| a.name.cmp(&b.name))
    });
    atomic_file::write_file(path, |file| {
        let failed = |source| Error::io(path, source);
        let header = header(&tensors);
        file.write_all(&(header.len() as u64).to_le_bytes())
            .map_err(failed)?;
        file.write_all(&header).map_err(failed)?;
        for spec in &tensors {
            let bytes = contents(spec)?;
            if bytes.len() as u64 != spec.size_in_bytes() {
                let message = format!(
                    "{} bytes were given for shape {:?} of {}",
                    bytes.len(),
                    spec.shape,
                    spec.dtype
                );
                return Err(Error::stored_tensor(path, &spec.name, message));
            }
            file.write_all(&bytes).map_err(failed)?;
        }
        Ok(())
    })
}

/// Writes `model.safetensors` into `folder`, or shards of at most `shard_bytes` (each holds at least one
/// tensor) and their index. Run it inside [`atomic_file::write_folder`].
///
/// # Errors
/// As [`write_safetensors`].
pub fn write_weights(
    folder: &Path,
    tensors: &[TensorSpec],
    shard_bytes: u64,
    mut contents: impl FnMut(&TensorSpec) -> Result<Vec<u8>>,
) -> Result<()> {
    let shards = split(tensors, shard_bytes);
    if let [all] = shards.as_slice() {
        return write_safetensors(&folder.join("model.safetensors"), all, contents);
    }
    let mut weight_map = Map::new();
    for (i, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        write_safetensors(&folder.join(&name), shard, &mut contents)?;
        weight_map.extend(shard.iter().map(|spec| (spec.name.clone(), json!(name))));
    }
    weight_map.sort_keys();
    let total: u64 = tensors.iter().map(TensorSpec::size_in_bytes).sum();
    write_json(
        &folder.join("model.safetensors.index.json"),
        &json!({ "metadata": { "total_size": total }, "weight_map": weight_map }),
    )
}

/// Writes `value` indented by two spaces, as Hugging Face's libraries do.
pub(crate) fn write_json(path: &Path, value: &Value) -> Result<()> {
    atomic_file::write_bytes(path, format!("{value:#}\n"))
}

fn split(tensors: &[TensorSpec], shard_bytes: u64) -> Vec<&[TensorSpec]> {
    let mut shards = Vec::new();
    let (mut start, mut size) = (0, 0);
    for (i, spec) in tensors.iter().enumerate() {
        if i > start && size + spec.size_in_bytes() > shard_bytes {
            shards.push(&tensors[start..i]);
            (start, size) = (i, 0);
        }
        size += spec.size_in_bytes();
    }
    shards.push(&tensors[start..]);
    shards
}

fn header(tensors: &[&TensorSpec]) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut start = 0;
    for spec in tensors {
        let stop = start + spec.size_in_bytes();
        let entry = json!({ "dtype": type_name(spec.dtype), "shape": spec.shape, "data_offsets": [start, stop] });
        entries.insert(spec.name.clone(), entry);
        start = stop;
    }
    let mut header = Value::Object(entries).to_string().into_bytes();
    // The data begin at a multiple of 8, so that a mapped file is aligned.
    header.resize(header.len().next_multiple_of(8), b' ');
    header
}

/// Position in the order that the `safetensors` library writes types in.
fn rank(dtype: DType) -> u8 {
    match dtype {
        DType::F32 => 0,
        DType::U32 => 1,
        DType::BF16 => 2,
        DType::F16 => 3,
        DType::U8 => 4,
    }
}

fn type_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "F32",
        DType::U32 => "U32",
        DType::BF16 => "BF16",
        DType::F16 => "F16",
        DType::U8 => "U8",
    }
}
