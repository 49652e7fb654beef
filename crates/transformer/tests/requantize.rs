//! Merging into a base in NF4 that stays in NF4.

use std::path::Path;

use fuselora_tensor::{DType, Device};
use fuselora_transformer::adapter::{Adapter, LoraWeights};
use fuselora_transformer::batch::Batch;
use fuselora_transformer::checkpoint::{Checkpoint, StoredType};
use fuselora_transformer::lora::{Lora, Pass};
use fuselora_transformer::merge::{merge_adapter, merge_requantized};
use fuselora_transformer::model::Model;
use fuselora_transformer::quantize::{Nf4Options, quantize_checkpoint};
use fuselora_transformer::{families, model};

const PARITY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/parity");
/// Half of the largest gap between two codes.
const HALF_GAP: f64 = 0.151_904;

fn float_base() -> Checkpoint {
    Checkpoint::open(Path::new(PARITY).join("linear-rope/base")).unwrap()
}

/// An adapter of the second layer alone.
fn adapter() -> Adapter {
    let (family, config) = families::read_config(float_base().config()).unwrap();
    let modules = model::modules(family, &config);
    let folder = Path::new(PARITY).join("layers-pattern/adapter-trained");
    Adapter::read(&folder, &modules, &Device::cpu()).unwrap()
}

/// `W + scaling·B·A` in f64.
fn merged(base: &[f32], lora: &LoraWeights) -> Vec<f64> {
    let (a, b) = (lora.a.to_f32_vec().unwrap(), lora.b.to_f32_vec().unwrap());
    let columns = a.len() / lora.rank;
    let update = |row: usize, column: usize| -> f64 {
        let of_row = b[row * lora.rank..][..lora.rank].iter();
        let of_column = a.iter().skip(column).step_by(columns);
        of_row
            .zip(of_column)
            .map(|(&b, &a)| f64::from(b) * f64::from(a))
            .sum()
    };
    let element = |(i, &w): (usize, &f32)| {
        f64::from(w) + f64::from(lora.scaling) * update(i / columns, i % columns)
    };
    base.iter().enumerate().map(element).collect()
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn merged_weights_are_quantized_again_and_the_error_is_told() {
    for double_quant in [false, true] {
        let options = Nf4Options {
            block_size: 64,
            double_quant,
        };
        let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let [base, out] = folders.each_ref().map(tempfile::TempDir::path);
        quantize_checkpoint(&float_base(), base, &options, None, DType::F32).unwrap();
        let base = Checkpoint::open(base).unwrap();
        let adapter = adapter();
        let errors = merge_requantized(&base, &adapter, out).unwrap();
        let out = Checkpoint::open(out).unwrap();
        assert_eq!(out.config(), base.config());
        let mut told = errors.iter();
        for name in base.tensor_names() {
            let (before, after) = (
                base.tensor_f32(name).unwrap(),
                out.tensor_f32(name).unwrap(),
            );
            assert_eq!(out.info(name).unwrap(), base.info(name).unwrap());
            let module = name.strip_suffix(".weight").unwrap_or(name);
            let Some(lora) = adapter.modules.get(module) else {
                assert_eq!(after, before, "{name}");
                continue;
            };
            assert_eq!(out.info(name).unwrap().dtype, StoredType::Nf4);
            let exact = merged(&before, lora);
            let difference = || {
                let pairs = after.iter().zip(&exact);
                pairs.map(|(&after, exact)| f64::from(after) - exact)
            };
            if !double_quant {
                let absmax = exact
                    .chunks(64)
                    .map(|block| block.iter().fold(0.0, |max: f64, x| max.max(x.abs())));
                let bounds = absmax.flat_map(|absmax| [absmax * HALF_GAP + 1e-6; 64]);
                assert!(
                    difference()
                        .zip(bounds)
                        .all(|(error, bound)| error.abs() <= bound)
                );
            }
            let error = norm(difference());
            let update = exact
                .iter()
                .zip(&before)
                .map(|(exact, &w)| exact - f64::from(w));
            let told = told.next().unwrap();
            assert_eq!(told.module, module);
            for (told, expected) in [
                (told.of_weight, error / norm(exact.iter().copied())),
                (told.of_update, error / norm(update)),
            ] {
                assert!(
                    (told / expected - 1.0).abs() < 1e-3,
                    "{module}: {told}, not {expected}"
                );
            }
        }
        assert!(told.next().is_none() && !errors.is_empty());
    }
}

/// GPT-2's matrices are turned before they are quantized, and lie transposed again as floats. The adapter, with DoRA, is of
/// four of its projections and leaves the others as they are.
#[test]
fn a_quantized_gpt2_computes_the_same_with_an_adapter_and_merged() {
    let case = Path::new(PARITY).join("gpt2-loraplus");
    let floats = Checkpoint::open(case.join("base")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let options = Nf4Options {
        block_size: 64,
        double_quant: true,
    };
    quantize_checkpoint(&floats, &path("quantized"), &options, None, DType::F32).unwrap();
    let quantized = Checkpoint::open(path("quantized")).unwrap();
    let load =
        |checkpoint: &Checkpoint| Model::load(checkpoint, &Device::cpu(), DType::F32).unwrap();
    let model = load(&quantized);
    let mut adapter = Adapter::read(
        &case.join("adapter-trained"),
        model.modules(),
        &Device::cpu(),
    )
    .unwrap();
    adapter
        .modules
        .retain(|module, _| !module.ends_with("c_fc"));
    merge_adapter(&quantized, &adapter, &path("merged"), Some(DType::F32)).unwrap();
    let errors = merge_requantized(&quantized, &adapter, &path("requantized")).unwrap();
    assert_eq!(errors.len(), adapter.modules.len());
    assert!(
        errors.iter().all(|error| error.of_weight < 0.15),
        "{errors:?}"
    );

    let batch = Batch::new(&Device::cpu(), &[5, 9, 2, 33, 1], &[5], &[0], &[0]).unwrap();
    let logits = |model: &Model, lora: Option<&Lora>| {
        let pass = Pass {
            lora,
            ..Pass::default()
        };
        model.logits(&batch, &pass).unwrap().to_f32_vec().unwrap()
    };
    let lora = Lora::bind(adapter, &model).unwrap();
    let expected = logits(&model, Some(&lora));
    let error = |name: &str| {
        let found = logits(&load(&Checkpoint::open(path(name)).unwrap()), None);
        let differences = found.iter().zip(&expected).map(|(f, e)| f64::from(f - e));
        norm(differences) / norm(expected.iter().map(|&e| f64::from(e)))
    };
    assert!(error("merged") < 1e-5, "{:e}", error("merged"));
    assert!(error("requantized") < 0.3, "{:e}", error("requantized"));
    let merged = Checkpoint::open(path("merged")).unwrap();
    assert_eq!(merged.config(), floats.config());
    for name in floats.tensor_names() {
        let [merged, floats] = [&merged, &floats].map(|one| one.info(name).unwrap().shape.clone());
        assert_eq!(merged, floats, "{name}");
    }
}

#[test]
fn a_base_of_floats_is_refused() {
    let out = tempfile::tempdir().unwrap();
    let error = merge_requantized(&float_base(), &adapter(), &out.path().join("merged"));
    let message = error.unwrap_err().to_string();
    assert!(message.contains("not in NF4"), "{message}");
    assert!(!out.path().join("merged").exists());
}
