//! Checkpoints in NF4: what bitsandbytes wrote and what is written here, and files that lie.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use fuselora_tensor::{DType, Device, Nf4Weight, Tensor, Weight, philox};
use fuselora_transformer::checkpoint::{
    Checkpoint, StoredType, TensorSpec, write_safetensors, write_weights,
};
use fuselora_transformer::model::Model;
use fuselora_transformer::quantize::{Nf4Options, quantize_checkpoint};
use safetensors::SafeTensors;
use serde_json::{Value, json};

const DOUBLE: Nf4Options = Nf4Options {
    block_size: 64,
    double_quant: true,
};
const MODULE: &str = "model.layers.0.self_attn.q_proj";

fn config() -> Value {
    json!({
        "model_type": "llama", "vocab_size": 20, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 12, "torch_dtype": "float32", "tie_word_embeddings": false,
    })
}

/// The tensors of a Llama of [`config`].
fn specs() -> Vec<TensorSpec> {
    let layer = "model.layers.0";
    let matrices = [
        ("model.embed_tokens".to_owned(), 20, 24),
        ("lm_head".to_owned(), 20, 24),
        (format!("{layer}.self_attn.q_proj"), 24, 24),
        (format!("{layer}.self_attn.k_proj"), 24, 24),
        (format!("{layer}.self_attn.v_proj"), 24, 24),
        (format!("{layer}.self_attn.o_proj"), 24, 24),
        (format!("{layer}.mlp.gate_proj"), 40, 24),
        (format!("{layer}.mlp.up_proj"), 40, 24),
        (format!("{layer}.mlp.down_proj"), 24, 40),
    ];
    let matrices = matrices.map(|(name, rows, columns)| (name, vec![rows, columns]));
    let norms = ["input_layernorm", "post_attention_layernorm"];
    let norms = norms.map(|name| (format!("{layer}.{name}"), vec![24]));
    let all = matrices.into_iter().chain(norms);
    let all = all.chain([("model.norm".to_owned(), vec![24])]);
    all.map(|(module, shape)| TensorSpec {
        name: format!("{module}.weight"),
        shape,
        dtype: DType::F32,
    })
    .collect()
}

fn values(spec: &TensorSpec) -> Vec<f32> {
    let count = spec.shape.iter().product::<usize>() as u32;
    let key = [spec.name.len() as u32, 5];
    let words = (0..count).map(|index| philox::philox4x32_10(key, [index, 0, 0, 0]));
    words.map(|words| philox::uniform(words[0]) - 0.5).collect()
}

/// A float checkpoint.
fn floats(config: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let contents = |spec: &TensorSpec| Ok(bytemuck::cast_slice(&values(spec)).to_vec());
    write_weights(folder.path(), &specs(), u64::MAX, contents).unwrap();
    folder
}

fn quantized(options: &Nf4Options) -> tempfile::TempDir {
    let base = floats(&config());
    let folder = tempfile::tempdir().unwrap();
    let base = Checkpoint::open(base.path()).unwrap();
    quantize_checkpoint(&base, folder.path(), options, None, DType::F32).unwrap();
    folder
}

type File = BTreeMap<String, (TensorSpec, Vec<u8>)>;

fn read(folder: &Path) -> File {
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.iter().map(|(name, view)| {
        let dtype = match view.dtype() {
            safetensors::Dtype::F32 => DType::F32,
            safetensors::Dtype::U8 => DType::U8,
            other => panic!("{other:?}"),
        };
        let spec = TensorSpec {
            name: name.to_owned(),
            shape: view.shape().to_vec(),
            dtype,
        };
        (name.to_owned(), (spec, view.data().to_vec()))
    });
    tensors.collect()
}

fn write(folder: &Path, file: &File) {
    let specs: Vec<_> = file.values().map(|(spec, _)| spec.clone()).collect();
    let path = folder.join("model.safetensors");
    write_safetensors(&path, &specs, |spec| Ok(file[&spec.name].1.clone())).unwrap();
}

/// The message of a checkpoint that does not open after `change`.
fn refusal(options: &Nf4Options, change: impl FnOnce(&mut File)) -> String {
    let folder = quantized(options);
    let mut file = read(folder.path());
    change(&mut file);
    write(folder.path(), &file);
    match Checkpoint::open(folder.path()) {
        Ok(_) => panic!("it opens"),
        Err(error) => error.to_string(),
    }
}

fn parity() -> Option<PathBuf> {
    let folder =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/parity/nf4/llama-qlora");
    if folder.exists() {
        return Some(folder);
    }
    eprintln!("SKIPPED: {} is not there", folder.display());
    None
}

#[test]
fn a_checkpoint_is_quantized_to_the_bytes_of_transformers() {
    let Some(folder) = parity() else { return };
    let base = Checkpoint::open(folder.join("base-f32")).unwrap();
    let out = tempfile::tempdir().unwrap();
    quantize_checkpoint(&base, out.path(), &DOUBLE, None, DType::F32).unwrap();
    let file = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
    let expected = folder.join("base-bnb-4bit");
    assert!(file(out.path()) == file(&expected));
    let config = |folder: &Path| -> Value {
        serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap()
    };
    assert_eq!(config(out.path()), config(&expected));
}

#[test]
fn what_is_written_is_read_again() {
    for double_quant in [false, true] {
        for block_size in [32, 64, 4096] {
            let options = Nf4Options {
                block_size,
                double_quant,
            };
            let folder = quantized(&options);
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            assert_eq!(checkpoint.nf4_source_dtype(), Some(DType::F32));
            let names: Vec<_> = checkpoint.tensor_names().collect();
            assert_eq!(names.len(), specs().len());
            for spec in specs() {
                let source =
                    Tensor::from_f32(&Device::cpu(), &spec.shape[..], &values(&spec)).unwrap();
                let whole = spec.name.contains("norm")
                    || spec.name.contains("embed")
                    || spec.name.contains("lm_head");
                let info = checkpoint.info(&spec.name).unwrap();
                assert_eq!(info.shape, spec.shape);
                assert_eq!(info.dtype == StoredType::Nf4, !whole, "{}", spec.name);
                let expected = if whole {
                    source
                } else {
                    let weight = Nf4Weight::quantize(&source, block_size, double_quant).unwrap();
                    weight.dequantize(DType::F32).unwrap()
                };
                let found = checkpoint.tensor_f32(&spec.name).unwrap();
                assert_eq!(found, expected.to_f32_vec().unwrap(), "{}", spec.name);
            }
        }
    }
}

#[test]
fn shards_and_other_storage_types_are_read() {
    let folder = quantized(&DOUBLE);
    let expected = Checkpoint::open(folder.path()).unwrap();
    let mut file = read(folder.path());
    // `bnb_4bit_quant_storage`: the same bytes under another type.
    let (spec, bytes) = file.get_mut(&format!("{MODULE}.weight")).unwrap();
    (spec.dtype, spec.shape) = (DType::F32, vec![bytes.len() / 4, 1]);
    let shards = tempfile::tempdir().unwrap();
    fs::copy(
        folder.path().join("config.json"),
        shards.path().join("config.json"),
    )
    .unwrap();
    let specs: Vec<_> = file.values().map(|(spec, _)| spec.clone()).collect();
    write_weights(shards.path(), &specs, 1500, |spec| {
        Ok(file[&spec.name].1.clone())
    })
    .unwrap();
    assert!(shards.path().join("model.safetensors.index.json").exists());
    let found = Checkpoint::open(shards.path()).unwrap();
    for name in expected.tensor_names() {
        assert_eq!(
            found.tensor_f32(name).unwrap(),
            expected.tensor_f32(name).unwrap(),
            "{name}"
        );
    }
}

#[test]
fn groups_that_lie_are_refused_by_name() {
    let part = |part: &str| format!("{MODULE}.weight{part}");
    let state = part(".quant_state.bitsandbytes__nf4");
    let shorten = |name: String| {
        move |file: &mut File| {
            let (spec, bytes) = file.get_mut(&name).unwrap();
            spec.shape[0] -= 1;
            bytes.truncate(spec.size_in_bytes() as usize);
        }
    };
    for name in [
        ".absmax",
        ".quant_map",
        ".nested_absmax",
        ".nested_quant_map",
        "",
    ] {
        let message = refusal(&DOUBLE, shorten(part(name)));
        assert!(
            message.contains(&format!("`{}`: has ", part(name))),
            "{message}"
        );
        let message = refusal(&DOUBLE, |file| drop(file.remove(&part(name))));
        assert!(
            message.contains(&format!("`{}`: is missing", part(name))),
            "{message}"
        );
    }
    let message = refusal(&DOUBLE, shorten(state.clone()));
    assert!(
        message.contains(&format!("`{state}`: holds no quantization state")),
        "{message}"
    );
    let message = refusal(&DOUBLE, |file| drop(file.remove(&state)));
    assert!(
        message.contains("has no model.layers.0.self_attn.q_proj.weight.quant_state"),
        "{message}"
    );

    let edits = [
        ("\"nf4\"", "\"fp4\"", "quant_type \"fp4\""),
        (
            "\"blocksize\": 64",
            "\"blocksize\": 48",
            "48 is not a power of two",
        ),
        ("[24, 24]", "[24, 25]", "has 288 bytes, and shape [24, 25]"),
        ("[24, 24]", "[24, 24, 1]", "is no matrix"),
        ("[24, 24]", "[9223372036854775807, 24]", "is no matrix"),
        (
            "\"nested_blocksize\": 256",
            "\"nested_blocksize\": 128",
            "nested_blocksize 128",
        ),
        (
            "\"nested_dtype\": \"float32\"",
            "\"nested_dtype\": \"float16\"",
            "nested_dtype",
        ),
        (
            "\"dtype\": \"float32\", \"shape\"",
            "\"dtype\": \"int8\", \"shape\"",
            "dtype \"int8\"",
        ),
        ("\"nested_offset\"", "\"other\"", "no nested_offset"),
        (
            "\"nested_offset\": 0.",
            "\"nested_offset\": 1e60, \"x\": 0.",
            "nested_offset",
        ),
    ];
    for (from, to, expected) in edits {
        let message = refusal(&DOUBLE, |file| {
            let (spec, bytes) = file.get_mut(&state).unwrap();
            let text = String::from_utf8(bytes.clone()).unwrap();
            assert!(text.contains(from), "{text}");
            *bytes = text.replace(from, to).into_bytes();
            spec.shape = vec![bytes.len()];
        });
        assert!(message.contains(expected), "{message}");
        assert!(message.contains(MODULE), "{message}");
    }
    let message = refusal(&DOUBLE, |file| {
        let (spec, bytes) = file.remove(&state).unwrap();
        let name = state.replace("nf4", "fp4");
        file.insert(name.clone(), (TensorSpec { name, ..spec }, bytes));
    });
    assert!(message.contains("quant_type \"fp4\""), "{message}");
    let message = refusal(&DOUBLE, |file| {
        file.get_mut(&part(".quant_map")).unwrap().1[0] ^= 1;
    });
    assert!(
        message.contains("quant_map`: holds other values"),
        "{message}"
    );
}

#[test]
fn configurations_of_other_quantizations_are_refused() {
    for (quantization, expected) in [
        (
            json!({"quant_method": "gptq"}),
            "`quantization_config.quant_method` is \"gptq\"",
        ),
        (
            json!({"quant_method": "bitsandbytes", "load_in_8bit": true}),
            "`quantization_config.load_in_4bit` is null",
        ),
        (
            json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "fp4"}),
            "`quantization_config.bnb_4bit_quant_type` is \"fp4\"",
        ),
    ] {
        let mut config = config();
        config["quantization_config"] = quantization;
        let folder = floats(&config);
        let Err(error) = Checkpoint::open(folder.path()) else {
            panic!("{expected}")
        };
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn what_is_quantized_already_or_not_finite_is_refused_and_leaves_no_file() {
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("quantized");
    let already = quantized(&DOUBLE);
    let already = Checkpoint::open(already.path()).unwrap();
    let error = quantize_checkpoint(&already, &target, &DOUBLE, None, DType::F32).unwrap_err();
    assert!(error.to_string().contains("is in NF4 already"), "{error}");

    let base = floats(&config());
    let mut file = read(base.path());
    let (_, bytes) = file.get_mut(&format!("{MODULE}.weight")).unwrap();
    bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    write(base.path(), &file);
    let base = Checkpoint::open(base.path()).unwrap();
    let error = quantize_checkpoint(&base, &target, &DOUBLE, None, DType::F32).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains(MODULE) && error.contains("not finite"),
        "{error}"
    );
    assert!(!target.exists());
}

/// Where a checkpoint in NF4 has floats, by `llm_int8_skip_modules`, they stay so whatever is asked for.
#[test]
fn modules_that_were_skipped_are_floats() {
    let folder = quantized(&DOUBLE);
    let mut file = read(folder.path());
    file.retain(|name, _| !name.starts_with(MODULE));
    let skipped = specs();
    let skipped = skipped.iter().find(|spec| spec.name.starts_with(MODULE));
    let skipped = skipped.unwrap();
    let values = values(skipped);
    let bytes = bytemuck::cast_slice(&values).to_vec();
    file.insert(skipped.name.clone(), (skipped.clone(), bytes));
    write(folder.path(), &file);
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["quantization_config"]["llm_int8_skip_modules"] = json!([MODULE]);
    fs::write(&path, config.to_string()).unwrap();

    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    for nf4 in [None, Some(&DOUBLE)] {
        let model = Model::load_quantized(&checkpoint, &Device::cpu(), DType::F32, nf4).unwrap();
        for module in model.modules().iter().filter(|m| m.name.ends_with("_proj")) {
            let weight = model.weight(&module.name).unwrap();
            assert_eq!(
                matches!(*weight, Weight::Nf4(_)),
                module.name != MODULE,
                "{}",
                module.name
            );
        }
        let found = model.weight(MODULE).unwrap();
        assert_eq!(found.to_f32_vec().unwrap(), values);
        let foreseen = Model::weight_bytes_when_loaded(&checkpoint, DType::F32, nf4).unwrap();
        assert_eq!(foreseen, model.weight_bytes() as u64);
    }
}

/// Projections that are quantized as they are loaded are those of the checkpoint that [`quantize_checkpoint`] writes.
#[test]
fn loading_in_4_bits_is_quantizing_and_loading() {
    let device = Device::cpu();
    let own = |name: &str| {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../tests/parity")
            .join(name)
            .join("base")
    };
    let gguf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama.gguf");
    // GPT-2's matrices lie transposed, and its head is its embedding.
    for base in [own("gpt2-dora"), own("qwen3"), gguf] {
        let base = Checkpoint::open(base).unwrap();
        let folder = tempfile::tempdir().unwrap();
        quantize_checkpoint(&base, folder.path(), &DOUBLE, None, DType::F32).unwrap();
        let written = Checkpoint::open(folder.path()).unwrap();
        let expected = Model::load(&written, &device, DType::F32).unwrap();
        let found = Model::load_quantized(&base, &device, DType::F32, Some(&DOUBLE)).unwrap();
        let mut compared = 0;
        for module in expected.modules() {
            let Some(expected) = expected.weight(&module.name) else {
                continue;
            };
            let found = found.weight(&module.name).unwrap();
            let quantized = matches!(*found, Weight::Nf4(_));
            assert_eq!(quantized, matches!(*expected, Weight::Nf4(_)));
            compared += usize::from(quantized);
            let [found, expected] = [&found, &expected].map(|weight| weight.to_f32_vec().unwrap());
            assert_eq!(found, expected, "{}", module.name);
        }
        assert!(compared >= 8);
    }
}
