//! Hugging Face folders: reading against the `safetensors` library, writing byte for byte as it does, and
//! what is refused.

use std::{
    borrow::Cow,
    fs,
    path::{Path, PathBuf},
};

use fuselora_tensor::{DType, Device};
use fuselora_transformer::{
    Result,
    checkpoint::{Checkpoint, TensorSpec, is_weight_file, write_weights},
};
use half::{bf16, f16};
use safetensors::{Dtype, View, serialize};
use serde_json::{Value, json};

struct Raw(Dtype, Vec<usize>, Vec<u8>);

impl View for &Raw {
    fn dtype(&self) -> Dtype {
        self.0
    }
    fn shape(&self) -> &[usize] {
        &self.1
    }
    fn data(&self) -> Cow<'_, [u8]> {
        (&self.2).into()
    }
    fn data_len(&self) -> usize {
        self.2.len()
    }
}

fn floats(values: &[f32]) -> Raw {
    Raw(
        Dtype::F32,
        vec![values.len()],
        bytemuck::cast_slice(values).to_vec(),
    )
}

fn write_file(path: &Path, tensors: &[(&str, &Raw)]) {
    fs::write(path, serialize(tensors.iter().copied(), None).unwrap()).unwrap();
}

/// A folder with config.json and a file of these tensors.
fn folder(tensors: &[(&str, &Raw)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), "{}").unwrap();
    write_file(&folder.path().join("model.safetensors"), tensors);
    folder
}

fn refusal(path: &Path) -> String {
    Checkpoint::open(path).err().expect("a refusal").to_string()
}

#[test]
fn shards_are_read_as_one() {
    let base = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../../shared/parity/llama-rslora-qv/base");
    if !base.is_dir() {
        println!("skipped: {} is not there", base.display());
        return;
    }
    let checkpoint = Checkpoint::open(&base).unwrap();
    let device = Device::cpu();
    let mut count = 0;
    for shard in [
        "model-00001-of-00003",
        "model-00002-of-00003",
        "model-00003-of-00003",
    ] {
        let bytes = fs::read(base.join(shard).with_extension("safetensors")).unwrap();
        for (name, view) in safetensors::SafeTensors::deserialize(&bytes)
            .unwrap()
            .tensors()
        {
            let tensor = checkpoint.load(&name, &device, DType::F32).unwrap();
            assert_eq!(&tensor.shape()[..], view.shape());
            assert_eq!(tensor.to_bytes().unwrap(), view.data(), "{name}");
            assert_eq!(
                device.memory().peak,
                0,
                "a mapped tensor takes no memory of the device"
            );
            count += 1;
        }
    }
    assert_eq!(checkpoint.tensor_names().count(), count);
    assert_eq!(checkpoint.config()["model_type"], "llama");
}

#[test]
fn every_float_type_is_read_as_every_other() {
    let values = [1.0f32, -0.333_333_34, 6.1e-5, 60_000.0, 1e-7];
    let halves: Vec<u8> = values
        .iter()
        .flat_map(|v| f16::from_f32(*v).to_le_bytes())
        .collect();
    let brains: Vec<u8> = values
        .iter()
        .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
        .collect();
    let doubles: Vec<u8> = values
        .iter()
        .flat_map(|v| f64::from(*v).to_le_bytes())
        .collect();
    let stored = [
        ("f16", Raw(Dtype::F16, vec![5], halves)),
        ("bf16", Raw(Dtype::BF16, vec![5], brains)),
        ("f32", floats(&values)),
        ("f64", Raw(Dtype::F64, vec![5], doubles)),
    ];
    let folder = folder(&stored.each_ref().map(|(name, raw)| (*name, raw)));
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    for (name, _) in &stored {
        let exact = |v: f32| match *name {
            "f16" => f16::from_f32(v).to_f32(),
            "bf16" => bf16::from_f32(v).to_f32(),
            _ => v,
        };
        let load = |dtype| {
            checkpoint
                .load(name, &Device::cpu(), dtype)
                .unwrap()
                .to_f32_vec()
                .unwrap()
        };
        assert_eq!(load(DType::F32), values.map(exact), "{name}");
        assert_eq!(
            load(DType::F16),
            values.map(|v| f16::from_f32(exact(v)).to_f32()),
            "{name}"
        );
        assert_eq!(
            load(DType::BF16),
            values.map(|v| bf16::from_f32(exact(v)).to_f32()),
            "{name}"
        );
        assert_eq!(
            checkpoint.tensor_f32(name).unwrap(),
            values.map(exact),
            "{name}"
        );
    }
}

#[test]
fn what_cannot_be_read_as_asked_is_refused() {
    let bytes = Raw(Dtype::U8, vec![3], vec![1, 2, 3]);
    let folder = folder(&[
        ("bytes", &bytes),
        ("large", &floats(&[1.0, 65_520.0])),
        ("endless", &floats(&[f32::INFINITY])),
    ]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let load = |name: &str, dtype| {
        checkpoint
            .load(name, &Device::cpu(), dtype)
            .map_err(|error| error.to_string())
    };
    assert_eq!(
        load("bytes", DType::U8).unwrap().to_bytes().unwrap(),
        [1, 2, 3]
    );
    assert!(
        load("bytes", DType::F32)
            .unwrap_err()
            .contains("`bytes`: holds U8, which cannot be read as f32")
    );
    assert!(
        load("large", DType::F16)
            .unwrap_err()
            .contains("`large`: holds values too large for f16")
    );
    assert!(load("large", DType::BF16).is_ok());
    assert!(load("endless", DType::F16).is_ok());
    assert!(
        load("other", DType::F32)
            .unwrap_err()
            .contains("`other`: is missing")
    );
}

#[test]
fn folders_that_are_no_model_say_why() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path();
    assert!(refusal(&path.join("none")).contains("does not exist"));
    assert!(refusal(path).contains("neither config.json nor a .gguf file"));
    fs::write(path.join("adapter_config.json"), "{}").unwrap();
    assert!(refusal(path).contains("LoRA adapter, not a model"));
    fs::write(path.join("a.gguf"), "").unwrap();
    assert!(refusal(path).contains("truncated"));
    fs::write(path.join("b.gguf"), "").unwrap();
    assert!(refusal(path).contains("2 .gguf files"));
    fs::write(path.join("notes.txt"), "").unwrap();
    assert!(refusal(&path.join("notes.txt")).contains("neither a model folder"));
    fs::write(path.join("config.json"), "{").unwrap();
    assert!(refusal(path).contains("config.json: is not valid JSON"));
    fs::write(path.join("config.json"), "[]").unwrap();
    assert!(refusal(path).contains("config.json: is not a JSON object"));
    fs::write(path.join("config.json"), "{}").unwrap();
    assert!(refusal(path).contains("neither model.safetensors nor"));
    fs::write(path.join("pytorch_model.bin"), "").unwrap();
    assert!(refusal(path).contains("pytorch_model.bin"));
}

#[test]
fn an_index_that_lies_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    fs::write(path.join("config.json"), "{}").unwrap();
    write_file(
        &path.join("one.safetensors"),
        &[("a", &floats(&[1.0])), ("b", &floats(&[2.0]))],
    );
    write_file(&path.join("two.safetensors"), &[("c", &floats(&[3.0]))]);
    write_file(&path.join("again.safetensors"), &[("a", &floats(&[1.0]))]);
    let index = |map: Value| {
        fs::write(
            path.join("model.safetensors.index.json"),
            json!({ "weight_map": map }).to_string(),
        )
        .unwrap();
        Checkpoint::open(path)
            .map(|_| ())
            .map_err(|error| error.to_string())
    };
    index(json!({ "a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors" }))
        .unwrap();
    let cases = [
        (
            json!({ "a": "three.safetensors" }),
            "the shard three.safetensors, which is missing",
        ),
        (
            json!({ "d": "one.safetensors" }),
            "`d`: is to lie in the shard \"one.safetensors\"",
        ),
        (
            json!({ "a": "one.safetensors", "c": "one.safetensors" }),
            "`c`: is to lie in the shard \"one.safetensors\"",
        ),
        (
            json!({ "a": "one.safetensors", "x": "again.safetensors" }),
            "`a`: is also in",
        ),
        (
            json!({ "a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors" }),
            "`b`: is to lie in the shard \"two.safetensors\"",
        ),
        (
            json!({ "a": "../one.safetensors" }),
            "`a`: lies in \"../one.safetensors\", which is no file name",
        ),
        (json!({ "a": "/etc/passwd" }), "is no file name"),
        (json!({ "a": 1 }), "`a`: has no file name"),
        (json!([]), "no object `weight_map`"),
    ];
    for (map, expected) in cases {
        let error = index(map).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

fn specs() -> Vec<TensorSpec> {
    let spec = |name: &str, shape: &[usize], dtype| TensorSpec {
        name: name.into(),
        shape: shape.to_vec(),
        dtype,
    };
    vec![
        spec("z", &[3], DType::F16),
        spec("b", &[2, 5], DType::F32),
        spec("u", &[4], DType::U8),
        spec("a", &[], DType::F32),
        spec("m", &[0, 7], DType::BF16),
        spec("i", &[2], DType::U32),
    ]
}

fn contents(spec: &TensorSpec) -> Result<Vec<u8>> {
    Ok((0..spec.size_in_bytes())
        .map(|i| (i * 37 + spec.name.len() as u64) as u8)
        .collect())
}

#[test]
fn a_file_is_the_safetensors_librarys_to_the_byte() {
    let folder = tempfile::tempdir().unwrap();
    write_weights(folder.path(), &specs(), u64::MAX, contents).unwrap();
    let raw: Vec<(String, Raw)> = specs()
        .iter()
        .map(|spec| {
            let dtype = match spec.dtype {
                DType::F32 => Dtype::F32,
                DType::U32 => Dtype::U32,
                DType::F16 => Dtype::F16,
                DType::BF16 => Dtype::BF16,
                DType::U8 => Dtype::U8,
            };
            (
                spec.name.clone(),
                Raw(dtype, spec.shape.clone(), contents(spec).unwrap()),
            )
        })
        .collect();
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let wanted = serialize(raw.iter().map(|(name, raw)| (name, raw)), Some(metadata)).unwrap();
    assert_eq!(
        fs::read(folder.path().join("model.safetensors")).unwrap(),
        wanted
    );
}

#[test]
fn shards_are_written_with_their_index() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), "{}").unwrap();
    // 6, then 40 alone, then 4 + 4 + 0 + 8.
    write_weights(folder.path(), &specs(), 16, contents).unwrap();
    let index: Value = serde_json::from_slice(
        &fs::read(folder.path().join("model.safetensors.index.json")).unwrap(),
    )
    .unwrap();
    assert_eq!(index["metadata"]["total_size"], 62);
    assert_eq!(index["weight_map"]["b"], "model-00002-of-00003.safetensors");
    assert_eq!(index["weight_map"]["i"], "model-00003-of-00003.safetensors");
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    for spec in specs() {
        let info = checkpoint.info(&spec.name).unwrap();
        assert_eq!(info.shape, spec.shape);
        assert_eq!(
            checkpoint.tensor_bytes(&spec.name, spec.dtype).unwrap(),
            contents(&spec).unwrap()
        );
    }
    assert!(
        is_weight_file("model-00002-of-00003.safetensors")
            && !is_weight_file("adapter_model.safetensors")
    );
}

#[test]
fn bytes_that_do_not_fit_are_refused_and_leave_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let error = write_weights(folder.path(), &specs(), u64::MAX, |_| Ok(vec![0; 4]))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`b`: 4 bytes were given for shape [2, 5] of f32"),
        "{error}"
    );
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}
