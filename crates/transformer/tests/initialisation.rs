//! Fresh adapters that are made of the frozen weights: against PEFT's, and what is written of them.

use std::path::{Path, PathBuf};

use fuselora_tensor::{DType, Device, Tensor};
use fuselora_transformer::adapter::{Adapter, AdapterConfig, InitLoraWeights, LoraWeights};
use fuselora_transformer::batch::Batch;
use fuselora_transformer::checkpoint::Checkpoint;
use fuselora_transformer::lora::{Lora, Pass};
use fuselora_transformer::model::Model;

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/parity")
        .join(name)
}

fn model_of(case: &Path) -> Model {
    let checkpoint = Checkpoint::open(case.join("base")).unwrap();
    Model::load(&checkpoint, &Device::cpu(), DType::F32).unwrap()
}

fn fresh(config: AdapterConfig, model: &Model) -> Adapter {
    Adapter::new(config, model.modules(), &Device::cpu(), 7, Some(model)).unwrap()
}

/// `B·A`, row by row.
fn product(lora: &LoraWeights) -> Vec<f64> {
    let (a, b) = (lora.a.to_f32_vec().unwrap(), lora.b.to_f32_vec().unwrap());
    let columns = a.len() / lora.rank;
    let of_row = |b: &[f32]| -> Vec<f64> {
        let element = |column: usize| {
            let terms = b.iter().zip(a.iter().skip(column).step_by(columns));
            terms.map(|(b, a)| f64::from(*b) * f64::from(*a)).sum()
        };
        (0..columns).map(element).collect()
    };
    b.chunks_exact(lora.rank).flat_map(of_row).collect()
}

fn relative_error(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(want).map(|(g, w)| g - w)) / norm(&mut want.iter().copied())
}

fn logits(model: &Model, lora: Option<&Lora>) -> Vec<f64> {
    let tokens = [3, 1, 4, 1, 5, 9, 2, 6];
    let batch = Batch::new(&Device::cpu(), &tokens, &[tokens.len()], &[], &[]).unwrap();
    let pass = Pass {
        lora,
        ..Pass::default()
    };
    let logits = model.logits(&batch, &pass).unwrap().to_f32_vec().unwrap();
    logits.into_iter().map(f64::from).collect()
}

/// Signs and rotations of factors are free; their products are not.
#[test]
fn fresh_updates_are_pefts() {
    for name in ["pissa", "gpt2-pissa", "olora", "loftq"] {
        let case = case(name);
        let model = model_of(&case);
        let folder = case.join("adapter-initial");
        let config = AdapterConfig::read(&folder).unwrap();
        let pefts = Adapter::read(&folder, model.modules(), &Device::cpu()).unwrap();
        let ours = fresh(config, &model);
        assert!(ours.modules.keys().eq(pefts.modules.keys()));
        for (module, lora) in &ours.modules {
            let error = relative_error(&product(lora), &product(&pefts.modules[module]));
            assert!(error < 3e-5, "{name}: {module}: {error:e}");
        }
    }
}

#[test]
fn a_randomised_decomposition_comes_close_with_its_iterations() {
    let model = model_of(&case("pissa"));
    let products = |init: &str| -> Vec<f64> {
        let folder = case("pissa").join("adapter-initial");
        let mut config = AdapterConfig::read(&folder).unwrap();
        config.init_lora_weights = InitLoraWeights::from_name(init).unwrap();
        let modules = fresh(config, &model).modules;
        modules.values().flat_map(product).collect()
    };
    let exact = products("pissa");
    let errors = ["pissa_niter_0", "pissa_niter_4", "pissa_niter_300"]
        .map(|init| relative_error(&products(init), &exact));
    assert!(errors[0] > 0.1 && errors[0] > 2.0 * errors[1], "{errors:?}");
    assert!(errors[2] < 1e-3, "{errors:?}");
}

#[test]
fn orthogonal_factors_cancel_and_are_of_pefts_size() {
    let model = model_of(&case("pissa"));
    let config = |rank: usize| {
        let folder = case("pissa").join("adapter-initial");
        let mut config = AdapterConfig::read(&folder).unwrap();
        config.init_lora_weights = InitLoraWeights::Orthogonal;
        config.rank_pattern.clear();
        config.rank = rank;
        config
    };
    let adapter = fresh(config(8), &model);
    let mut squares = Vec::new();
    for lora in adapter.modules.values() {
        assert!(product(lora).iter().all(|value| value.abs() < 1e-7));
        for tensor in [&lora.a, &lora.b] {
            squares.extend(tensor.to_f32_vec().unwrap().iter().map(|v| v * v));
        }
    }
    // An element is a sum of rank / 2 normal values by those of a unit vector's half, and a tenth of it.
    let mean = squares.iter().sum::<f32>() / squares.len() as f32;
    assert!((mean / 0.005 - 1.0).abs() < 0.1, "{mean}");
    let odd = Adapter::new(config(3), model.modules(), &Device::cpu(), 7, Some(&model));
    let said = odd.err().unwrap().to_string();
    assert!(said.contains("rank 3 is not even"), "{said}");
}

#[test]
fn embeddings_start_with_a_normal_b_and_no_a() {
    let model = model_of(&case("lora-embedding"));
    for (name, a_deviation) in [("true", 0.0), ("gaussian", 0.0), ("false", 1.0)] {
        let mut config =
            AdapterConfig::read(&case("lora-embedding").join("adapter-initial")).unwrap();
        (config.rank, config.init_lora_weights) = (200, InitLoraWeights::from_name(name).unwrap());
        let adapter = fresh(config, &model);
        let lora = &adapter.modules["model.embed_tokens"];
        // Of 12,800 and 3,200 values.
        for (tensor, wanted) in [(&lora.a, a_deviation), (&lora.b, 1.0)] {
            let values = tensor.to_f32_vec().unwrap();
            let mean = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
            assert!((mean - wanted).abs() < 0.1, "{name}: {mean}");
        }
    }
}

/// A trained stand-in: every value of A and B moved a little.
fn moved(mut lora: Lora) -> Lora {
    for (index, tensor) in lora.parameters_mut().enumerate() {
        let mut values = tensor.to_f32_vec().unwrap();
        for (at, value) in values.iter_mut().enumerate() {
            *value += 0.02 * ((index * 7 + at * 3) % 11) as f32 - 0.1;
        }
        *tensor = Tensor::from_f32(&Device::cpu(), tensor.shape(), &values).unwrap();
    }
    lora
}

#[test]
fn what_is_written_computes_the_same() {
    for (name, dora, rslora) in [
        ("pissa", false, false),
        ("olora", true, false),
        ("olora", false, true),
    ] {
        let model = model_of(&case(name));
        let mut config = AdapterConfig::read(&case(name).join("adapter-initial")).unwrap();
        (config.use_dora, config.use_rslora) = (dora, rslora);
        let rank = config.rank;
        let unchanged = Lora::bind(fresh(config.clone(), &model), &model).unwrap();
        let error = relative_error(&logits(&model, Some(&unchanged)), &logits(&model, None));
        assert!(error < 1e-5, "{name}: fresh: {error:e}");

        let lora = moved(unchanged);
        let want = logits(&model, Some(&lora));
        assert!(relative_error(&want, &logits(&model, None)) > 0.1);
        let folder = tempfile::tempdir().unwrap();
        let read = |part: &str| {
            let path = folder.path().join(part);
            let adapter = Adapter::read(&path, model.modules(), &Device::cpu()).unwrap();
            Lora::bind(adapter, &model).unwrap()
        };
        lora.write(&folder.path().join("use")).unwrap();
        let used = read("use");
        assert_eq!(used.config().rank, 2 * rank);
        assert_eq!(
            used.config().init_lora_weights,
            InitLoraWeights::KaimingUniform
        );
        let error = relative_error(&logits(&model, Some(&used)), &want);
        assert!(error < 1e-5, "{name}: for use: {error:e}");

        lora.write_for_training(&folder.path().join("training"))
            .unwrap();
        let trained = read("training");
        assert_eq!(trained.config().rank, rank);
        assert_eq!(logits(&model, Some(&trained)), want, "{name}: to the bit");
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let refused = |name: &str, init: &str, change: fn(&mut AdapterConfig)| {
        let model = model_of(&case(name));
        let mut config = AdapterConfig::read(&case(name).join("adapter-initial")).unwrap();
        config.init_lora_weights = InitLoraWeights::from_name(init).unwrap();
        change(&mut config);
        let refused = Adapter::new(config, model.modules(), &Device::cpu(), 7, Some(&model));
        refused.err().expect("a refusal").to_string()
    };
    for init in ["olora", "loftq"] {
        let said = refused("gpt2-pissa", init, |_| ());
        assert!(said.contains(init) && said.contains("Conv1D"), "{said}");
    }
    let said = refused("pissa", "pissa", |config| config.rank = 9);
    assert!(
        said.contains("k_proj") && said.contains("rank 9 is more than the weight's 8"),
        "{said}"
    );
    let said = refused("lora-embedding", "olora", |_| ());
    assert!(said.contains("projections of blocks only"), "{said}");
}
