//! Training on a base in NF4.

use std::fs;
use std::path::{Path, PathBuf};

use fuselora_tensor::DType;
use fuselora_transformer::checkpoint::{Checkpoint, TensorSpec, write_weights};
use serde_json::Value;

use crate::{losses, own_case, train};

/// What an adapter, or its training, may have.
const OPTIONS: [&[&str]; 6] = [
    &["--lora-dropout=0.1"],
    &["--use-dora", "--lora-dropout=0.1"],
    &["--use-rslora", "--lora-bias", "--target-modules=q_proj"],
    &[
        "--target-modules=q_proj,down_proj",
        "--modules-to-save=lm_head,k_norm",
    ],
    &[
        "--target-modules=v_proj,o_proj",
        "--trainable-token-indices=2,3,5",
    ],
    &["--rank=256", "--loraplus-lr-ratio=4", "--optim=adamw_8bit"],
];

/// A Qwen3 in NF4 with double quantization, as `quantize` writes it, and the values of its weights as floats.
fn bases(folder: &Path) -> [PathBuf; 2] {
    let [quantized, floats] = ["quantized", "floats"].map(|name| folder.join(name));
    let mut command = assert_cmd::Command::new(env!("CARGO_BIN_EXE_fuselora"));
    command
        .arg("quantize")
        .arg("--model")
        .arg(own_case("qwen3").join("base"));
    command.arg("--output").arg(&quantized);
    command
        .arg("--bnb-4bit-use-double-quant")
        .assert()
        .success();

    let checkpoint = Checkpoint::open(&quantized).unwrap();
    let mut config: Value =
        serde_json::from_slice(&fs::read(quantized.join("config.json")).unwrap()).unwrap();
    assert!(
        config
            .as_object_mut()
            .unwrap()
            .remove("quantization_config")
            .is_some()
    );
    fs::create_dir(&floats).unwrap();
    fs::write(floats.join("config.json"), config.to_string()).unwrap();
    let specs: Vec<_> = checkpoint
        .tensor_names()
        .map(|name| TensorSpec {
            name: name.to_owned(),
            shape: checkpoint.info(name).unwrap().shape.clone(),
            dtype: DType::F32,
        })
        .collect();
    write_weights(&floats, &specs, u64::MAX, |spec| {
        let values = checkpoint.tensor_f32(&spec.name)?;
        Ok(values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect())
    })
    .unwrap();
    [quantized, floats]
}

/// Whatever is trained, the frozen weights are the numbers that NF4 stands for; a pass computed twice, and a run that was
/// stopped, give the same bits.
#[test]
fn a_base_in_4_bits_trains_as_floats_do() {
    let folder = tempfile::tempdir().unwrap();
    let [quantized, floats] = bases(folder.path());
    for options in OPTIONS {
        let run = |name: &str, base: &Path, more: &[&str]| {
            let output = folder.path().join(name);
            let mut command = train(base, &own_case("qwen3").join("train.jsonl"), &output);
            command.args([
                "--learning-rate=3e-3",
                "--lr-scheduler=constant",
                "--batch-size=2",
            ]);
            command.args(options).args(more).assert().success();
            output
        };
        let found = run("found", &quantized, &["--steps=4"]);
        let expected = run("expected", &floats, &["--steps=4"]);
        let pairs = losses(&found).into_iter().zip(losses(&expected));
        assert_eq!(pairs.len(), 4);
        for ((step, loss, norm), (_, float_loss, float_norm)) in pairs {
            let error = (loss / float_loss - 1.0)
                .abs()
                .max((norm / float_norm - 1.0).abs());
            assert!(
                error < 1e-4,
                "{options:?}: step {step}: relative error {error:e}"
            );
        }
        let again = run(
            "again",
            &quantized,
            &["--steps=4", "--gradient-checkpointing"],
        );
        run("stopped", &quantized, &["--steps=2"]);
        let continued = run("stopped", &quantized, &["--steps=4", "--resume"]);
        let adapter = |folder: &Path| fs::read(folder.join("adapter_model.safetensors")).unwrap();
        for other in [&again, &continued] {
            assert_eq!(
                losses(other),
                losses(&found),
                "{options:?}: {}",
                other.display()
            );
            assert!(
                adapter(other) == adapter(&found),
                "{options:?}: {}",
                other.display()
            );
        }
        for name in ["found", "expected", "again", "stopped"] {
            fs::remove_dir_all(folder.path().join(name)).unwrap();
        }
    }
}
