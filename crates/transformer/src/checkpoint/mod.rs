//! Checkpoints: a model's configuration and weights, whatever the file format.
//!
//! A [`Checkpoint`] is a Hugging Face folder (`config.json` with one `model.safetensors` or several shards
//! and their index) or a GGUF file. Both give the same view: a Hugging Face configuration, and tensors by
//! their Hugging Face names. Files are mapped, not read, and everything in their headers is checked first.
//! A weight that bitsandbytes quantized to NF4 is one tensor here, of the shape that it had.

mod bitsandbytes;
mod mapped;
pub(crate) mod safetensors;
mod stored;
mod writer;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use fuselora_tensor::{DType, Device, Tensor, Weight};
use serde_json::Value;

use bitsandbytes::StoredNf4;
pub use bitsandbytes::{Nf4Parts, nf4_tensors};
pub(crate) use mapped::MappedFile;
pub(crate) use stored::{RowOrder, StoredTensor};
pub use stored::{StoredType, TensorInfo};
pub(crate) use writer::write_json;
pub use writer::{SHARD_BYTES, TensorSpec, is_weight_file, write_safetensors, write_weights};

use crate::{
    error::{Error, Result},
    gguf::GgufFile,
};

/// A model's configuration and weights.
pub struct Checkpoint {
    path: PathBuf,
    config: Value,
    tensors: BTreeMap<String, StoredTensor>,
    nf4: BTreeMap<String, StoredNf4>,
    gguf: Option<GgufFile>,
}

impl Checkpoint {
    /// Opens a Hugging Face folder, a `.gguf` file, or a folder with exactly one `.gguf` file.
    ///
    /// # Errors
    /// When the path is none of these, or a file is missing, truncated or corrupt.
    pub fn open(path: impl AsRef<Path>) -> Result<Checkpoint> {
        let path = path.as_ref();
        if path.is_file() {
            return match path.extension() {
                Some(extension) if extension == "gguf" => Checkpoint::open_gguf(path),
                _ => Err(Error::file(
                    path,
                    "is neither a model folder nor a .gguf file",
                )),
            };
        }
        if !path.is_dir() {
            return Err(Error::file(
                path,
                "does not exist; give a folder with config.json and safetensors files, or a .gguf file",
            ));
        }
        if path.join("config.json").is_file() {
            return Checkpoint::open_hugging_face(path);
        }
        match gguf_files(path)?.as_slice() {
            [file] => Checkpoint::open_gguf(file),
            [] if path.join("adapter_config.json").is_file() => Err(Error::file(
                path,
                "holds a LoRA adapter, not a model; give its base model here, and it as the adapter",
            )),
            [] => Err(Error::file(
                path,
                "holds neither config.json nor a .gguf file",
            )),
            several => Err(Error::file(
                path,
                format!("holds {} .gguf files; name one of them", several.len()),
            )),
        }
    }

    fn open_hugging_face(path: &Path) -> Result<Checkpoint> {
        let config = read_json(&path.join("config.json"))?;
        if !config.is_object() {
            return Err(Error::file(
                path.join("config.json"),
                "is not a JSON object",
            ));
        }
        bitsandbytes::check_config(&config)?;
        let mut tensors = read_weights(path)?;
        Ok(Checkpoint {
            path: path.to_owned(),
            config,
            nf4: bitsandbytes::take_weights(&mut tensors)?,
            tensors,
            gguf: None,
        })
    }

    fn open_gguf(path: &Path) -> Result<Checkpoint> {
        let gguf = GgufFile::open(path)?;
        let (config, tensors) = gguf.to_hugging_face()?;
        Ok(Checkpoint {
            path: path.to_owned(),
            config,
            tensors,
            nf4: BTreeMap::new(),
            gguf: Some(gguf),
        })
    }

    /// The folder or the GGUF file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The Hugging Face configuration, a JSON object: `config.json`, or what a GGUF's metadata say in its terms.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The GGUF file, where the checkpoint is one.
    pub fn gguf(&self) -> Option<&GgufFile> {
        self.gguf.as_ref()
    }

    /// The Hugging Face names of all tensors, sorted.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        let names: BTreeSet<&String> = self.tensors.keys().chain(self.nf4.keys()).collect();
        names.into_iter().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name) || self.nf4.contains_key(name)
    }

    /// The type that NF4 weights had before they were quantized, and nothing where there are none.
    pub fn nf4_source_dtype(&self) -> Option<DType> {
        self.nf4.values().next().map(StoredNf4::source_dtype)
    }

    /// A weight that is stored in NF4.
    pub(crate) fn nf4(&self, name: &str) -> Option<&StoredNf4> {
        self.nf4.get(name)
    }

    /// Shape and stored type of a tensor.
    ///
    /// # Errors
    /// When there is no such tensor.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        match self.nf4.get(name) {
            Some(nf4) => Ok(nf4.info()),
            None => Ok(self.stored(name)?.info()),
        }
    }

    /// The elements of a float tensor as f32, dequantized where need be.
    ///
    /// # Errors
    /// When there is no such tensor, or it holds no floats.
    pub fn tensor_f32(&self, name: &str) -> Result<Vec<f32>> {
        match self.nf4.get(name) {
            Some(nf4) => Ok(nf4
                .load(&Device::cpu())?
                .dequantize(DType::F32)?
                .to_f32_vec()?),
            None => self.stored(name)?.to_f32(name),
        }
    }

    /// The elements of a tensor as little-endian bytes of `dtype`, dequantized and rounded where need be.
    ///
    /// # Errors
    /// When there is no such tensor, or it cannot be read as that type.
    pub fn tensor_bytes(&self, name: &str, dtype: DType) -> Result<Vec<u8>> {
        match self.nf4.get(name) {
            Some(nf4) => Ok(nf4.load(&Device::cpu())?.dequantize(dtype)?.to_bytes()?),
            None => self.stored(name)?.to_bytes(name, dtype),
        }
    }

    /// A tensor on a device, as `dtype`. Where the file holds that type already, the CPU reads the mapped
    /// file itself and copies nothing.
    ///
    /// # Errors
    /// When there is no such tensor, it cannot be read as that type, or the device has no room.
    pub fn load(&self, name: &str, device: &Device, dtype: DType) -> Result<Tensor> {
        match self.nf4.get(name) {
            Some(nf4) => Ok(nf4
                .load(&Device::cpu())?
                .dequantize(dtype)?
                .to_device(device)?),
            None => self.stored(name)?.load(name, device, dtype),
        }
    }

    /// A matrix on a device: NF4 where it is stored so, and else as `dtype`, as by [`Checkpoint::load`].
    ///
    /// # Errors
    /// As [`Checkpoint::load`].
    pub fn load_weight(&self, name: &str, device: &Device, dtype: DType) -> Result<Weight> {
        match self.nf4.get(name) {
            Some(nf4) => Ok(nf4.load(device)?.into()),
            None => Ok(Weight::Dense(self.load(name, device, dtype)?)),
        }
    }

    /// Gives memory back that a tensor takes for having been read, where nothing that was loaded shares it.
    pub(crate) fn release(&self, name: &str) -> Result<()> {
        self.stored(name)?.release();
        Ok(())
    }

    fn stored(&self, name: &str) -> Result<&StoredTensor> {
        self.tensors
            .get(name)
            .ok_or_else(|| Error::stored_tensor(&self.path, name, "is missing"))
    }
}

/// The GGUF files of a folder, sorted.
fn gguf_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = |source| Error::io(folder, source);
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "gguf")
        {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read(path).map_err(|source| Error::io(path, source))?;
    serde_json::from_slice(&text)
        .map_err(|error| Error::file(path, format!("is not valid JSON: {error}")))
}

/// The tensors of a folder: of its one safetensors file, or of all shards that its index names.
fn read_weights(folder: &Path) -> Result<BTreeMap<String, StoredTensor>> {
    let index = folder.join("model.safetensors.index.json");
    if index.is_file() {
        return read_shards(folder, &index);
    }
    let single = folder.join("model.safetensors");
    if single.is_file() {
        return safetensors::read(&single);
    }
    if folder.join("pytorch_model.bin").exists()
        || folder.join("pytorch_model.bin.index.json").exists()
    {
        return Err(Error::file(
            folder,
            "holds its weights as pytorch_model.bin, a format that can run code; save it as safetensors first",
        ));
    }
    Err(Error::file(
        folder,
        "holds neither model.safetensors nor model.safetensors.index.json",
    ))
}

fn read_shards(folder: &Path, index: &Path) -> Result<BTreeMap<String, StoredTensor>> {
    let json = read_json(index)?;
    let map = json
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| Error::file(index, "has no object `weight_map`"))?;
    let mut shards = BTreeSet::new();
    for (tensor, shard) in map {
        let shard = shard
            .as_str()
            .ok_or_else(|| Error::stored_tensor(index, tensor, "has no file name"))?;
        // A shard is a file of this folder: an index must not reach others.
        if Path::new(shard).file_name() != Some(shard.as_ref()) {
            return Err(Error::stored_tensor(
                index,
                tensor,
                format!("lies in \"{shard}\", which is no file name"),
            ));
        }
        shards.insert(shard);
    }
    let mut tensors = BTreeMap::new();
    for shard in shards {
        let path = folder.join(shard);
        if !path.is_file() {
            return Err(Error::file(
                index,
                format!("names the shard {shard}, which is missing"),
            ));
        }
        for (name, tensor) in safetensors::read(&path)? {
            if let Some(other) = tensors.insert(name.clone(), tensor) {
                return Err(Error::stored_tensor(
                    path,
                    name,
                    format!("is also in {}", other.path().display()),
                ));
            }
        }
    }
    for (name, shard) in map {
        let found = tensors
            .get(name)
            .and_then(|tensor| tensor.path().file_name()?.to_str());
        if found != shard.as_str() {
            return Err(Error::stored_tensor(
                index,
                name,
                format!("is to lie in the shard {shard}, and is not there"),
            ));
        }
    }
    Ok(tensors)
}
