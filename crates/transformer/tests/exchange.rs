//! Adapters in the formats of llama.cpp and mlx-lm, against what these programs write and compute (`tests/exchange`).

use std::fs;
use std::path::{Path, PathBuf};

use fuselora_tensor::{DType, Device};
use fuselora_transformer::adapter::{
    AdaptedModel, Adapter, AdapterFormat, AdapterSummary, LoraWeights, diff,
};
use fuselora_transformer::batch::Batch;
use fuselora_transformer::checkpoint::Checkpoint;
use fuselora_transformer::gguf::GgufFile;
use fuselora_transformer::lora::{Lora, Pass};
use fuselora_transformer::model::Model;
use safetensors::SafeTensors;
use serde_json::Value;

fn tests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests")
}

fn parity(case: &str) -> PathBuf {
    tests().join("parity").join(case)
}

fn adapted(case: &str) -> AdaptedModel {
    AdaptedModel::of(&Checkpoint::open(parity(case).join("base")).unwrap()).unwrap()
}

fn f32s(file: &Path, name: &str) -> Vec<f32> {
    let bytes = fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let values = tensors.tensor(name).unwrap().data().as_chunks().0.to_vec();
    values.into_iter().map(f32::from_le_bytes).collect()
}

/// Logits of the case's first row with an adapter.
fn logits(case: &str, adapter: Adapter) -> Vec<f32> {
    let checkpoint = Checkpoint::open(parity(case).join("base")).unwrap();
    let model = Model::load(&checkpoint, &Device::cpu(), DType::F32).unwrap();
    let lora = Lora::bind(adapter, &model).unwrap();
    let rows = fs::read_to_string(parity(case).join("train.jsonl")).unwrap();
    let row: Value = serde_json::from_str(rows.lines().next().unwrap()).unwrap();
    let ids: Vec<u32> = serde_json::from_value(row["input_ids"].clone()).unwrap();
    let batch = Batch::new(&Device::cpu(), &ids, &[ids.len()], &[0], &[0]).unwrap();
    let pass = Pass {
        lora: Some(&lora),
        ..Pass::default()
    };
    model.logits(&batch, &pass).unwrap().to_f32_vec().unwrap()
}

fn assert_close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = found.iter().zip(expected).map(|(f, e)| square(f - e)).sum();
    let error = (difference / expected.iter().map(|e| square(*e)).sum::<f64>()).sqrt();
    assert!(error < 1e-5, "{error:e}");
}

#[test]
fn adapters_of_mlx_lm_are_read_and_written() {
    let model = adapted("layers-pattern");
    for (name, kind) in [("mlx-lora", "LoRA"), ("mlx-dora", "DoRA")] {
        let folder = tests().join("exchange").join(name);
        let adapter = model.read_adapter(&folder).unwrap();
        let out = tempfile::tempdir().unwrap();
        model
            .write_adapter(&adapter, AdapterFormat::Mlx, out.path(), DType::F32)
            .unwrap();
        let file = |folder: &Path| {
            let bytes = fs::read(folder.join("adapters.safetensors")).unwrap();
            let tensors = SafeTensors::deserialize(&bytes).unwrap();
            let tensors = tensors.iter();
            let mut all: Vec<_> = tensors
                .map(|(name, view)| (name.to_owned(), view.shape().to_vec(), view.data().to_vec()))
                .collect();
            all.sort();
            all
        };
        assert!(file(out.path()) == file(&folder), "{name}");
        let config = |folder: &Path| -> Value {
            let text = fs::read(folder.join("adapter_config.json")).unwrap();
            serde_json::from_slice(&text).unwrap()
        };
        let (ours, theirs) = (config(out.path()), config(&folder));
        assert_eq!(ours["fine_tune_type"], theirs["fine_tune_type"]);
        for key in ["rank", "scale", "dropout"] {
            assert_eq!(
                ours["lora_parameters"][key].as_f64(),
                theirs["lora_parameters"][key].as_f64()
            );
        }
        let keys = |config: &Value| {
            let mut keys: Vec<String> =
                serde_json::from_value(config["lora_parameters"]["keys"].clone()).unwrap();
            keys.sort();
            keys
        };
        assert_eq!(keys(&ours), keys(&theirs));
        let summary = AdapterSummary::read(&folder).unwrap().unwrap();
        assert_eq!((summary.kind, summary.rank, summary.alpha), (kind, 3, 7.5));
        assert_eq!(summary.modules, adapter.modules.len());
        let expected = f32s(&folder.join("expected-logits.safetensors"), "logits");
        assert_close(&logits("layers-pattern", adapter), &expected);
    }
}

#[test]
fn adapters_of_llama_cpp_are_read_and_written() {
    let model = adapted("layers-pattern");
    let theirs = tests().join("exchange/llama.gguf");
    let expected = parity("layers-pattern").join("expected-logits.safetensors");
    let adapter = model.read_adapter(&theirs).unwrap();
    assert_close(
        &logits("layers-pattern", adapter),
        &f32s(&expected, "trained_logits_probe"),
    );

    let pefts = model
        .read_adapter(&parity("layers-pattern").join("adapter-trained"))
        .unwrap();
    let out = tempfile::tempdir().unwrap();
    let ours = out.path().join("adapter.gguf");
    model
        .write_adapter(&pefts, AdapterFormat::Gguf, &ours, DType::F32)
        .unwrap();
    let [ours, theirs] = [&ours, &theirs].map(|path| GgufFile::open(path).unwrap());
    for key in [
        "general.type",
        "general.architecture",
        "adapter.type",
        "adapter.lora.alpha",
    ] {
        assert_eq!(
            ours.metadata().get(key),
            theirs.metadata().get(key),
            "{key}"
        );
    }
    let names = |file: &GgufFile| -> Vec<(String, Vec<usize>)> {
        file.tensors()
            .map(|(name, shape)| (name.to_owned(), shape.to_vec()))
            .collect()
    };
    assert_eq!(names(&ours), names(&theirs));
    for (name, _) in theirs.tensors() {
        assert_eq!(
            ours.tensor_f32(name).unwrap(),
            theirs.tensor_f32(name).unwrap(),
            "{name}"
        );
    }
}

/// Both formats hold what PEFT's has of plain updates, so that what comes back is the same to the bit; where ranks and
/// scalings differ between modules, to rounding.
#[test]
fn what_is_written_comes_back() {
    let cases = [
        "gpt2-loraplus",
        "layers-pattern",
        "linear-rope",
        "mistral-window",
        "qwen3",
        "lora-embedding",
    ];
    for case in cases {
        let model = adapted(case);
        let mut adapter = model
            .read_adapter(&parity(case).join("adapter-trained"))
            .unwrap();
        // Of this one the updates alone.
        adapter.config.use_dora = false;
        adapter.config.modules_to_save.clear();
        adapter.trained.clear();
        adapter
            .modules
            .values_mut()
            .for_each(|lora| lora.magnitude = None);
        for uneven in [false, true] {
            if uneven {
                let name = adapter.modules.keys().next().unwrap().clone();
                let lora = adapter.modules.get_mut(&name).unwrap();
                shorten(lora);
                adapter.config.rank_pattern = vec![(name.clone(), lora.rank)];
                adapter.config.alpha_pattern =
                    vec![(name, f64::from(lora.scaling) * lora.rank as f64)];
            }
            for format in [AdapterFormat::Gguf, AdapterFormat::Mlx] {
                let folder = tempfile::tempdir().unwrap();
                let path = folder.path().join("adapter");
                model
                    .write_adapter(&adapter, format, &path, DType::F32)
                    .unwrap();
                assert_eq!(AdapterFormat::of(&path), Some(format));
                let again = folder.path().join("again");
                let read = model.read_adapter(&path).unwrap();
                read.write(&again).unwrap();
                let read = Adapter::read(&again, model.modules(), &Device::cpu()).unwrap();
                assert!(
                    read.modules.keys().eq(adapter.modules.keys()),
                    "{case} {format}"
                );
                for difference in diff(&adapter, &read).unwrap() {
                    let bound = if uneven { 1e-6 } else { 0.0 };
                    assert!(
                        difference.relative() <= bound,
                        "{case} {format}: {difference:?}"
                    );
                }
            }
        }
    }
}

/// One rank less, and another scaling.
fn shorten(lora: &mut LoraWeights) {
    let rank = lora.rank - 1;
    let tensor = |shape: [usize; 2], values: Vec<f32>| {
        fuselora_tensor::Tensor::from_f32(&Device::cpu(), shape, &values).unwrap()
    };
    let (in_features, out_features) = (lora.a.shape()[1], lora.b.shape()[0]);
    let a = lora.a.to_f32_vec().unwrap();
    let b = lora.b.to_f32_vec().unwrap();
    let rows = b
        .chunks_exact(lora.rank)
        .flat_map(|row| row[..rank].to_vec());
    lora.b = tensor([out_features, rank], rows.collect());
    lora.a = tensor([rank, in_features], a[..rank * in_features].to_vec());
    (lora.rank, lora.scaling) = (rank, 0.3);
}

#[test]
fn differences_are_those_of_the_products() {
    let model = adapted("linear-rope");
    let read = |part: &str| {
        model
            .read_adapter(&parity("linear-rope").join(part))
            .unwrap()
    };
    let (first, second) = (read("adapter-trained"), read("adapter-initial"));
    let product = |lora: &LoraWeights| -> Vec<f64> {
        let (a, b) = (lora.a.to_f32_vec().unwrap(), lora.b.to_f32_vec().unwrap());
        let columns = lora.a.shape()[1];
        let element = |row: &[f32], column: usize| {
            let terms = row.iter().zip(a.iter().skip(column).step_by(columns));
            let sum: f64 = terms.map(|(b, a)| f64::from(*b) * f64::from(*a)).sum();
            f64::from(lora.scaling) * sum
        };
        let rows = b.chunks_exact(lora.rank);
        rows.flat_map(|row| {
            (0..columns)
                .map(move |column| element(row, column))
                .collect::<Vec<_>>()
        })
        .collect()
    };
    let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
    let differences = diff(&first, &second).unwrap();
    assert_eq!(differences.len(), first.modules.len());
    for found in &differences {
        let [one, other] =
            [&first, &second].map(|adapter| product(&adapter.modules[&found.module]));
        let rest: Vec<f64> = one.iter().zip(&other).map(|(a, b)| a - b).collect();
        for (found, expected) in [
            (found.first, norm(&one)),
            (found.second, norm(&other)),
            (found.difference, norm(&rest)),
        ] {
            assert!(
                (found.unwrap() - expected).abs() <= 1e-7 * norm(&one),
                "{found:?} {expected}"
            );
        }
    }
    assert!(
        diff(&first, &first)
            .unwrap()
            .iter()
            .all(|module| module.relative() == 0.0)
    );
}

#[test]
fn what_has_no_place_or_does_not_fit_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let refusal = |case: &str, format: AdapterFormat| {
        let model = adapted(case);
        let adapter = model
            .read_adapter(&parity(case).join("adapter-trained"))
            .unwrap();
        let path = folder.path().join("refused");
        let error = model
            .write_adapter(&adapter, format, &path, DType::F32)
            .unwrap_err();
        assert!(!path.exists());
        error.to_string()
    };
    use AdapterFormat::{Gguf, Mlx};
    for (case, format, expected) in [
        ("gpt2-dora", Gguf, "with DoRA cannot become a GGUF file"),
        ("bias-lora-only", Gguf, "with `bias` cannot become"),
        (
            "lora-bias",
            Mlx,
            "with `bias` cannot become an adapter of mlx-lm",
        ),
        ("trainable-tokens", Mlx, "`trainable_token_indices`"),
        (
            "lora-embedding-tied",
            Mlx,
            "`model.embed_tokens` shares its table",
        ),
        (
            "lora-head-tied",
            Gguf,
            "takes no low-rank update of `lm_head`",
        ),
        (
            "gpt2-lora-embedding",
            Gguf,
            "takes no low-rank update of `transformer.wpe`",
        ),
    ] {
        let message = refusal(case, format);
        assert!(message.contains(expected), "{case}: {message}");
    }

    // Files that do not fit the model, or are broken.
    let theirs = tests().join("exchange/llama.gguf");
    let unread = |model: &str, path: &Path| match adapted(model).read_adapter(path) {
        Ok(_) => panic!("{} is read", path.display()),
        Err(error) => error.to_string(),
    };
    let message = unread("qwen3", &theirs);
    assert!(
        message.contains("`general.architecture` \"llama\", and this model takes \"qwen3\""),
        "{message}"
    );
    let message = unread("qwen3", &tests().join("exchange/mlx-lora"));
    assert!(message.contains("has an update of [16, 3]"), "{message}");
    assert!(message.contains("does not fit"), "{message}");
    let broken = folder.path().join("broken.gguf");
    let bytes = fs::read(&theirs).unwrap();
    fs::write(&broken, &bytes[..bytes.len() - 100]).unwrap();
    let message = unread("layers-pattern", &broken);
    assert!(message.contains("truncated or corrupt"), "{message}");
    let model = tests().join("../crates/transformer/tests/fixtures/tiny-llama.gguf");
    assert!(unread("layers-pattern", &model).contains("is no adapter"));
    let message = unread("layers-pattern", Path::new("not/there"));
    assert!(message.contains("is not there"), "{message}");
}
