//! Several adapters on one base: switched from call to call, and combined, against PEFT's `add_weighted_adapter`.

use std::path::Path;

use fuselora_tensor::{DType, Device};
use fuselora_transformer::adapter::{Adapter, Combination, LoraWeights, Module, combine};
use fuselora_transformer::batch::Batch;
use fuselora_transformer::checkpoint::Checkpoint;
use fuselora_transformer::lora::{Lora, Pass};
use fuselora_transformer::model::Model;
use fuselora_transformer::{families, model};

const TESTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests");

fn modules() -> Vec<Module> {
    let checkpoint = Checkpoint::open(Path::new(TESTS).join("parity/linear-rope/base")).unwrap();
    let (family, config) = families::read_config(checkpoint.config()).unwrap();
    model::modules(family, &config)
}

fn read(folder: &str) -> Adapter {
    Adapter::read(&Path::new(TESTS).join(folder), &modules(), &Device::cpu()).unwrap()
}

fn both() -> [(Adapter, f64); 2] {
    [
        (read("parity/linear-rope/adapter-trained"), 0.75),
        (read("parity/layers-pattern/adapter-trained"), -1.5),
    ]
}

/// `scaling·B·A`, row by row.
fn product(lora: &LoraWeights) -> Vec<f64> {
    let (a, b) = (lora.a.to_f32_vec().unwrap(), lora.b.to_f32_vec().unwrap());
    let columns = a.len() / lora.rank;
    let of_row = |b: &[f32]| -> Vec<f64> {
        let element = |column: usize| {
            let terms = b.iter().zip(a.iter().skip(column).step_by(columns));
            let sum: f64 = terms.map(|(b, a)| f64::from(*b) * f64::from(*a)).sum();
            sum * f64::from(lora.scaling)
        };
        (0..columns).map(element).collect()
    };
    b.chunks_exact(lora.rank).flat_map(of_row).collect()
}

#[test]
fn combinations_are_pefts() {
    let combinations = [
        ("linear", Combination::Linear),
        ("cat", Combination::Cat),
        ("svd", Combination::Svd(Some(5))),
    ];
    for (name, combination) in combinations {
        let ours = combine(&both(), combination).unwrap();
        let folder = tempfile::tempdir().unwrap();
        ours.write(folder.path()).unwrap();
        let ours = Adapter::read(folder.path(), &modules(), &Device::cpu()).unwrap();
        let pefts = read(&format!("combine/{name}"));
        assert!(ours.modules.keys().eq(pefts.modules.keys()), "{name}");
        assert_eq!(ours.config.rank, pefts.config.rank);
        for (module, lora) in &ours.modules {
            let (got, want) = (product(lora), product(&pefts.modules[module]));
            let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
            let difference = norm(&mut got.iter().zip(&want).map(|(g, w)| g - w));
            let error = (difference / norm(&mut want.iter().copied())).sqrt();
            assert!(error < 1e-5, "{name}: {module}: {error:e}");
        }
    }
}

/// The model's weights are never touched, so that what came before leaves no trace.
#[test]
fn adapters_are_switched_per_call_to_the_bit() {
    let checkpoint = Checkpoint::open(Path::new(TESTS).join("parity/linear-rope/base")).unwrap();
    let model = Model::load(&checkpoint, &Device::cpu(), DType::F32).unwrap();
    let tokens = [3, 1, 4, 1, 5, 9, 2, 6];
    let batch = Batch::new(&Device::cpu(), &tokens, &[tokens.len()], &[], &[]).unwrap();
    let logits = |lora: Option<&Lora>| {
        let pass = Pass {
            lora,
            ..Pass::default()
        };
        model.logits(&batch, &pass).unwrap().to_f32_vec().unwrap()
    };
    let alone = logits(None);
    let loras = both().map(|(adapter, _)| Lora::bind(adapter, &model).unwrap());
    let first = loras.each_ref().map(|lora| logits(Some(lora)));
    assert!(first[0] != alone && first[1] != alone && first[0] != first[1]);
    for _ in 0..2 {
        for (lora, first) in loras.iter().zip(&first) {
            assert_eq!(&logits(Some(lora)), first);
        }
        assert_eq!(logits(None), alone);
    }
}

#[test]
fn what_does_not_add_up_is_refused() {
    let refused = |change: fn(&mut Adapter), combination: Combination| {
        let mut adapters = both();
        change(&mut adapters[1].0);
        let refused = combine(&adapters, combination);
        refused.err().expect("a refusal").to_string()
    };
    let said = refused(|adapter| adapter.config.use_dora = true, Combination::Cat);
    assert!(said.contains("an adapter with DoRA"), "{said}");
    let said = refused(|_| (), Combination::Svd(Some(9)));
    assert!(said.contains("k_proj") && said.contains("rank 9"), "{said}");
    let mut adapters = both();
    let ranks = combine(&both(), Combination::Cat).unwrap();
    adapters[1].0 = ranks;
    let said = combine(&adapters, Combination::Linear)
        .err()
        .unwrap()
        .to_string();
    assert!(said.contains("use cat or svd"), "{said}");
}
