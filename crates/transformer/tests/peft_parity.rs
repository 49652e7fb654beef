//! The decoder and its backward pass against what PEFT and transformers computed (`../shared/parity`).

use std::path::{Path, PathBuf};

use fuselora_tensor::{DType, Device, Tensor};
use fuselora_transformer::adapter::Adapter;
use fuselora_transformer::batch::Batch;
use fuselora_transformer::checkpoint::Checkpoint;
use fuselora_transformer::generate::{GenerateOptions, generate};
use fuselora_transformer::lora::{DropoutSeed, Lora, LoraGradients, Pass};
use fuselora_transformer::memory_estimate::{MemoryEstimate, TrainingShape};
use fuselora_transformer::merge::merge_adapter;
use fuselora_transformer::model::{Model, TrainingOptions};
use fuselora_transformer::quantize::Nf4Options;
use safetensors::SafeTensors;
use serde_json::Value;

/// Cases in float checkpoints, one of them sharded.
const CASES: [&str; 6] = [
    "gpt2-lora",
    "llama-dora",
    "llama-lora",
    "llama-rslora-qv",
    "llama-clip-decay",
    "qwen2-patterns",
];

/// Cases of this repository: families, and options of adapters.
const OWN_CASES: [&str; 27] = [
    "llama3-rope",
    "linear-rope",
    "dynamic-rope",
    "mistral-window",
    "qwen3",
    "gpt2-dora",
    "dora-dropout",
    "layers-pattern",
    "bias-lora-only",
    "gpt2-bias-all",
    "bias-dora-dropout",
    "lora-bias",
    "modules-to-save",
    "modules-to-save-tied",
    "gpt2-modules-to-save",
    "lora-embedding",
    "lora-embedding-tied",
    "lora-head-tied",
    "gpt2-lora-embedding",
    "trainable-tokens",
    "trainable-tokens-tied",
    "pissa",
    "gpt2-pissa",
    "olora",
    "loftq",
    "loraplus",
    "gpt2-loraplus",
];

/// The case whose base bitsandbytes has quantized.
const NF4_CASE: &str = "nf4/llama-qlora";

/// The folders of all cases that are there.
fn cases() -> impl Iterator<Item = PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity");
    let own = OWN_CASES.map(|name| own.join(name));
    let shared = CASES.into_iter().chain([NF4_CASE]);
    shared.filter_map(case).chain(own)
}

/// The base of a case.
fn base(folder: &Path) -> Checkpoint {
    let quantized = folder.join("base-bnb-4bit");
    let path = if quantized.exists() {
        quantized
    } else {
        folder.join("base")
    };
    Checkpoint::open(path).unwrap()
}

fn case(name: &str) -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../../shared/parity")
        .join(name);
    if !folder.exists() {
        eprintln!("SKIPPED: {} is not there", folder.display());
        return None;
    }
    Some(folder)
}

struct Case {
    folder: PathBuf,
    model: Model,
    lora: Lora,
    rows: Vec<(Vec<u32>, Vec<i64>)>,
    expected: Value,
}

impl Case {
    fn load(folder: PathBuf, adapter: &str) -> Case {
        Case::load_on(&Device::cpu(), DType::F32, folder, adapter)
    }

    fn load_on(device: &Device, dtype: DType, folder: PathBuf, adapter: &str) -> Case {
        let checkpoint = base(&folder);
        let model = Model::load(&checkpoint, device, dtype).unwrap();
        let adapter = Adapter::read(&folder.join(adapter), model.modules(), device).unwrap();
        let lora = Lora::bind(adapter, &model).unwrap();
        let text = std::fs::read_to_string(folder.join("train.jsonl")).unwrap();
        let rows = text
            .lines()
            .map(|line| {
                let row: Value = serde_json::from_str(line).unwrap();
                let ids = serde_json::from_value(row["input_ids"].clone()).unwrap();
                (ids, serde_json::from_value(row["labels"].clone()).unwrap())
            })
            .collect();
        let expected =
            serde_json::from_str(&std::fs::read_to_string(folder.join("expected.json")).unwrap())
                .unwrap();
        Case {
            folder,
            model,
            lora,
            rows,
            expected,
        }
    }

    fn batch(&self, rows: std::ops::Range<usize>) -> Batch {
        let (mut tokens, mut lengths, mut target_rows, mut targets) =
            (vec![], vec![], vec![], vec![]);
        for (ids, labels) in &self.rows[rows] {
            for (i, &label) in labels
                .iter()
                .enumerate()
                .skip(1)
                .filter(|(_, label)| **label >= 0)
            {
                target_rows.push((tokens.len() + i - 1) as u32);
                targets.push(label as u32);
            }
            tokens.extend(ids);
            lengths.push(ids.len());
        }
        Batch::new(
            self.model.device(),
            &tokens,
            &lengths,
            &target_rows,
            &targets,
        )
        .unwrap()
    }

    fn expected_tensor(&self, file: &str, name: &str) -> Vec<f32> {
        self.find_expected(file, name).unwrap()
    }

    fn find_expected(&self, file: &str, name: &str) -> Option<Vec<f32>> {
        let bytes = std::fs::read(self.folder.join(file)).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = tensors.tensor(name).ok()?;
        let values = tensor.data().chunks(4);
        Some(
            values
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect(),
        )
    }
}

fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f64| x * x;
    let difference: f64 = got
        .iter()
        .zip(want)
        .map(|(g, w)| square(f64::from(*g) - f64::from(*w)))
        .sum();
    (difference / want.iter().map(|w| square(f64::from(*w))).sum::<f64>()).sqrt()
}

/// What rounding may cost.
struct Bounds {
    logits: f64,
    loss: f64,
    gradients: f64,
}

const F32: Bounds = Bounds {
    logits: 1e-5,
    loss: 1e-5,
    gradients: 1e-4,
};

/// Weights, activations and their gradients keep eight bits of every number, and sums of some dozen of them
/// follow one another: a few times 2^-8.
#[cfg(feature = "cuda")]
const BF16: Bounds = Bounds {
    logits: 3e-2,
    loss: 3e-3,
    gradients: 6e-2,
};

impl Case {
    fn check_logits(&self, bounds: &Bounds) {
        let batch = self.batch(0..1);
        for (key, lora) in [
            ("base_logits_probe", None),
            ("adapter_logits_probe", Some(&self.lora)),
        ] {
            let pass = Pass {
                lora,
                ..Pass::default()
            };
            let logits = self.model.logits(&batch, &pass).unwrap();
            let want = self.expected_tensor("expected-logits.safetensors", key);
            let error = relative_error(&logits.to_f32_vec().unwrap(), &want);
            assert!(
                error < bounds.logits,
                "{}: {key}: {error:e}",
                self.folder.display()
            );
        }
    }

    fn check_first_gradients(&self, gradient_checkpointing: bool, bounds: &Bounds) {
        let size = |key: &str| self.expected[key].as_u64().unwrap() as usize;
        let batches: Vec<Batch> = (0..size("gradient_accumulation"))
            .map(|micro| self.batch(micro * size("batch_size")..(micro + 1) * size("batch_size")))
            .collect();
        let targets: usize = batches.iter().map(Batch::target_count).sum();
        let mut gradients = LoraGradients::zeros(&self.lora).unwrap();
        let device = self.model.device();
        let step = Tensor::from_u32(device, [1], &[0]).unwrap();
        let scale = Tensor::full_f32(device, [1], 1.0 / targets as f32).unwrap();
        let pass = Pass {
            lora: Some(&self.lora),
            dropout: Some(DropoutSeed {
                seed: 42,
                step: &step,
            }),
            ..Pass::default()
        };
        let options = TrainingOptions {
            gradient_checkpointing,
        };
        let mut loss = self.model.zero_loss().unwrap();
        for batch in &batches {
            self.model
                .forward_backward(batch, &pass, &mut gradients, &scale, options, &mut loss)
                .unwrap();
        }
        let loss = f64::from(loss.to_f32_vec().unwrap()[0]) / targets as f64;
        let want = self.expected["steps"][0]["loss"].as_f64().unwrap();
        let error = (loss / want - 1.0).abs();
        assert!(
            error < bounds.loss,
            "{}: loss {error:e}",
            self.folder.display()
        );
        let file = "expected-first-gradients.safetensors";
        for ((name, _), gradient) in self.lora.parameters().zip(gradients.tensors()) {
            // In memory PEFT's magnitude is a module with a weight; in its files it is not.
            let want = self
                .find_expected(file, &name)
                .or_else(|| self.find_expected(file, &format!("{name}.weight")))
                .unwrap_or_else(|| panic!("{name}"));
            let error = relative_error(&gradient.to_f32_vec().unwrap(), &want);
            assert!(
                error < bounds.gradients,
                "{}: {name}: {error:e}",
                self.folder.display()
            );
        }
    }
}

#[test]
fn logits_agree_with_and_without_the_adapter() {
    for folder in cases() {
        Case::load(folder, "adapter-initial").check_logits(&F32);
    }
}

#[test]
fn the_first_gradients_agree_with_and_without_checkpointing() {
    for folder in cases() {
        let case = Case::load(folder, "adapter-initial");
        for gradient_checkpointing in [false, true] {
            case.check_first_gradients(gradient_checkpointing, &F32);
        }
    }
}

/// The kernels in place of the CPU's operations: of the large cases one in both types and one in NF4, because a simulated
/// GPU takes its time, and every small one.
#[cfg(feature = "cuda")]
#[test]
fn the_kernels_agree() {
    ptxsim_driver::select("h100").unwrap();
    let device = Device::cuda(0).unwrap();
    let check = |folder: PathBuf, dtype: DType, bounds: &Bounds| {
        let case = Case::load_on(&device, dtype, folder, "adapter-initial");
        case.check_logits(bounds);
        case.check_first_gradients(false, bounds);
    };
    if let Some(folder) = case("llama-lora") {
        check(folder.clone(), DType::F32, &F32);
        check(folder, DType::BF16, &BF16);
    }
    if let Some(folder) = case(NF4_CASE) {
        check(folder, DType::F32, &F32);
    }
    let own = |name: &str| {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../tests/parity")
            .join(name)
    };
    for name in OWN_CASES {
        check(own(name), DType::F32, &F32);
    }
    // One with each part that is held in f32 beside activations of 16 bits.
    for name in [
        "bias-dora-dropout",
        "gpt2-modules-to-save",
        "lora-bias",
        "lora-embedding-tied",
        "trainable-tokens-tied",
    ] {
        check(own(name), DType::BF16, &BF16);
    }
}

#[test]
fn greedy_generation_with_the_cache_agrees() {
    for folder in cases() {
        let case = Case::load(folder, "adapter-trained");
        if case.expected.get("greedy_generate").is_none() {
            continue;
        }
        let ids = |key: &str| -> Vec<u32> {
            serde_json::from_value(case.expected["greedy_generate"][key].clone()).unwrap()
        };
        let (prompt, want) = (ids("prompt"), ids("tokens"));
        let options = GenerateOptions {
            max_new_tokens: want.len() - prompt.len(),
            temperature: 0.0,
            top_p: 1.0,
            seed: 0,
            stop_tokens: vec![],
        };
        let got = generate(&case.model, Some(&case.lora), &prompt, &options, |_| {
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(got, want[prompt.len()..], "{}", case.folder.display());
    }
}

#[test]
fn merged_checkpoints_agree() {
    for folder in cases() {
        let merged = tempfile::tempdir().unwrap();
        let base = base(&folder);
        let case = Case::load(folder, "adapter-trained");
        let path = case.folder.join("adapter-trained");
        let adapter = Adapter::read(&path, case.model.modules(), &Device::cpu()).unwrap();
        merge_adapter(&base, &adapter, merged.path(), Some(DType::F32)).unwrap();

        let merged = Checkpoint::open(merged.path()).unwrap();
        let model = Model::load(&merged, &Device::cpu(), DType::F32).unwrap();
        let logits = model.logits(&case.batch(0..1), &Pass::default()).unwrap();
        let want = case.expected_tensor("expected-logits.safetensors", "trained_logits_probe");
        let error = relative_error(&logits.to_f32_vec().unwrap(), &want);
        assert!(error < 1e-5, "{}: {error:e}", case.folder.display());

        let file = "expected-merged.safetensors";
        if !case.folder.join(file).exists() {
            continue; // The script says why.
        }
        // PEFT decomposes in f32, where singular vectors of close values are off by some times the rounding.
        let bound = match case.lora.config().init_lora_weights.replaces_base() {
            true => 1e-5,
            false => 1e-6,
        };
        let mut compared = 0;
        for name in merged.tensor_names() {
            let got = merged.load(name, &Device::cpu(), DType::F32).unwrap();
            let full = ["", "transformer."].map(|base| format!("{base}{name}"));
            let want = full.iter().find_map(|name| case.find_expected(file, name));
            // Some of the files hold the adapted weights alone.
            let Some(want) = want else { continue };
            compared += 1;
            let error = relative_error(&got.to_f32_vec().unwrap(), &want);
            assert!(
                error < bound,
                "{}: {name}: {error:e}",
                case.folder.display()
            );
        }
        assert!(compared >= case.lora.module_count(), "{compared} compared");
    }
}

#[test]
fn weights_take_the_memory_that_was_foreseen() {
    for folder in cases() {
        let checkpoint = base(&folder);
        let options = Nf4Options {
            block_size: 128,
            double_quant: true,
        };
        for (dtype, nf4) in [
            (DType::F32, None),
            (DType::BF16, None),
            (DType::F32, Some(&options)),
        ] {
            let model = Model::load_quantized(&checkpoint, &Device::cpu(), dtype, nf4).unwrap();
            let foreseen = Model::weight_bytes_when_loaded(&checkpoint, dtype, nf4).unwrap();
            assert_eq!(
                model.weight_bytes() as u64,
                foreseen,
                "{}",
                folder.display()
            );
        }
    }
}

/// Of one pass forward and back: what blocks keep, the largest working set and the gradients.
fn check_estimate(case: &Case, rows: std::ops::Range<usize>, dtype: DType) {
    let batch = case.batch(rows);
    let device = case.model.device();
    for gradient_checkpointing in [false, true] {
        let before = device.memory().current;
        device.reset_peak();
        let mut gradients = LoraGradients::zeros(&case.lora).unwrap();
        let pass = Pass {
            lora: Some(&case.lora),
            ..Pass::default()
        };
        let options = TrainingOptions {
            gradient_checkpointing,
        };
        let mut loss = case.model.zero_loss().unwrap();
        let scale = Tensor::full_f32(device, [1], 1.0).unwrap();
        case.model
            .forward_backward(&batch, &pass, &mut gradients, &scale, options, &mut loss)
            .unwrap();
        let taken = device.memory().peak - before;
        let targets = case.lora.config().resolve(case.model.modules()).unwrap();
        let shape = TrainingShape {
            tokens: batch.rows().total(),
            whole_parameters: 0,
            derived_bytes: 0,
            weight_bytes: 0,
            own_base_bytes: 0,
            activations: dtype,
            quantized: case.folder.ends_with(NF4_CASE),
            moments_in_8_bits: false,
            gradient_checkpointing,
            on_cpu: device.is_cpu(),
        };
        let estimate = MemoryEstimate::new(case.model.config(), &targets, shape);
        let expected = estimate.activations + estimate.workspace + estimate.gradients;
        let ratio = taken as f64 / expected as f64;
        assert!(
            (0.9..1.1).contains(&ratio),
            "{}, {dtype}, checkpointing {gradient_checkpointing}: {taken} bytes taken, {expected} estimated",
            case.folder.display()
        );
    }
}

#[test]
fn training_takes_the_memory_that_was_estimated() {
    for folder in CASES.into_iter().chain([NF4_CASE]).filter_map(case) {
        let case = Case::load(folder, "adapter-initial");
        check_estimate(&case, 0..case.rows.len(), DType::F32);
    }
}

/// With enough tokens that weights in NF4 are dequantized first.
#[cfg(feature = "cuda")]
#[test]
fn training_takes_the_memory_that_was_estimated_on_a_device() {
    ptxsim_driver::select("h100").unwrap();
    let device = Device::cuda(0).unwrap();
    for folder in ["llama-lora", NF4_CASE].into_iter().filter_map(case) {
        let case = Case::load_on(&device, DType::BF16, folder, "adapter-initial");
        let lengths = case.rows.iter().map(|(ids, _)| ids.len());
        let sums = lengths.scan(0, |sum, len| {
            *sum += len;
            Some(*sum)
        });
        let rows = sums.take_while(|&sum| sum < 128).count() + 1;
        check_estimate(&case, 0..rows, DType::BF16);
    }
}
