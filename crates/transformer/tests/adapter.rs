//! Adapters against PEFT's own files, and PEFT's rules.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use fuselora_tensor::Device;
use fuselora_transformer::{
    adapter::{
        Adapter, AdapterConfig, InitLoraWeights, Module, ModuleKind, ModuleSelector, TrainedBiases,
        TrainedTokens,
    },
    checkpoint::Checkpoint,
    families, model,
};
use proptest::prelude::*;
use serde_json::{Value, json};

/// The folder with PEFT's cases, or `None` with a word where it is absent.
fn parity() -> Option<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/parity");
    if !folder.is_dir() {
        println!("skipped: {} is not there", folder.display());
        return None;
    }
    Some(folder)
}

/// Cases of this repository.
fn own_cases() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity")
}

/// The modules of a checkpoint.
fn modules_of(base: &Path) -> Vec<Module> {
    let checkpoint = Checkpoint::open(base).unwrap();
    let (family, config) = families::read_config(checkpoint.config()).unwrap();
    model::modules(family, &config)
}

fn module_of(name: &str, in_features: usize, out_features: usize) -> Module {
    Module {
        name: name.to_owned(),
        kind: ModuleKind::Linear,
        in_features,
        out_features,
        bias: false,
        tied: false,
    }
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn pefts_adapters_are_read_and_written_to_the_byte() {
    let shared = parity().into_iter().flat_map(|parity| {
        let cases = [
            "llama-lora",
            "llama-rslora-qv",
            "llama-clip-decay",
            "llama-dora",
            "qwen2-patterns",
            "gpt2-lora",
        ];
        cases.map(|case| parity.join(case))
    });
    let own = fs::read_dir(own_cases())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir());
    for case in shared.chain(own) {
        let modules = modules_of(&case.join("base"));
        for adapter in ["adapter-initial", "adapter-trained"] {
            let folder = case.join(adapter);
            let read = Adapter::read(&folder, &modules, &Device::cpu()).unwrap();
            let out = tempfile::tempdir().unwrap();
            read.write(out.path()).unwrap();
            for file in ["adapter_model.safetensors", "adapter_config.json"] {
                let (ours, pefts) = (out.path().join(file), folder.join(file));
                if file.ends_with("json") {
                    assert_eq!(read_json(&ours), read_json(&pefts), "{}", case.display());
                } else {
                    assert!(
                        fs::read(&ours).unwrap() == fs::read(&pefts).unwrap(),
                        "{}: {file} differs",
                        case.display()
                    );
                }
            }
        }
    }
}

#[test]
fn scaling_is_pefts() {
    let Some(parity) = parity() else { return };
    let scalings = |case: &str, module: &str| {
        let linear = modules_of(&parity.join(case).join("base"));
        let adapter = Adapter::read(
            &parity.join(case).join("adapter-trained"),
            &linear,
            &Device::cpu(),
        )
        .unwrap();
        let lora = &adapter.modules[module];
        (lora.rank, lora.scaling)
    };
    assert_eq!(
        scalings("llama-lora", "model.layers.1.mlp.up_proj"),
        (8, 2.0)
    );
    assert_eq!(
        scalings("llama-rslora-qv", "model.layers.0.self_attn.q_proj"),
        (4, 4.0)
    );
    assert_eq!(
        scalings("qwen2-patterns", "model.layers.0.self_attn.q_proj"),
        (4, 4.0)
    );
    assert_eq!(
        scalings("qwen2-patterns", "model.layers.0.self_attn.v_proj"),
        (8, 4.0)
    );
    assert_eq!(
        scalings("qwen2-patterns", "model.layers.0.mlp.down_proj"),
        (16, 1.0)
    );
    assert_eq!(
        scalings("qwen2-patterns", "model.layers.0.mlp.up_proj"),
        (8, 2.0)
    );
}

fn two_layers() -> Vec<Module> {
    let mut linear = Vec::new();
    for layer in 0..2 {
        for (part, in_features, out_features) in [
            ("self_attn.q_proj", 16, 24),
            ("self_attn.v_proj", 16, 8),
            ("mlp.down_proj", 32, 16),
        ] {
            linear.push(module_of(
                &format!("model.layers.{layer}.{part}"),
                in_features,
                out_features,
            ));
        }
    }
    linear.push(module_of("lm_head", 16, 64));
    linear
}

fn names(list: &[&str]) -> ModuleSelector {
    ModuleSelector::Names(list.iter().map(|name| (*name).to_owned()).collect())
}

fn config(target_modules: ModuleSelector) -> AdapterConfig {
    AdapterConfig::new(4, 8.0, target_modules)
}

/// The chosen modules without `model.layers.`, or the refusal.
fn chosen(config: &AdapterConfig) -> Result<Vec<String>, String> {
    let targets = config
        .resolve(&two_layers())
        .map_err(|error| error.to_string())?;
    Ok(targets
        .into_iter()
        .map(|target| target.module.replace("model.layers.", ""))
        .collect())
}

#[test]
fn targets_are_chosen_as_peft_chooses() {
    let by_names = |list: &[&str]| chosen(&config(names(list))).unwrap();
    assert_eq!(
        by_names(&["q_proj"]),
        ["0.self_attn.q_proj", "1.self_attn.q_proj"]
    );
    assert_eq!(
        by_names(&["model.layers.1.mlp.down_proj", "0.self_attn.v_proj"]),
        ["0.self_attn.v_proj", "1.mlp.down_proj"]
    );
    assert_eq!(by_names(&["lm_head"]), ["lm_head"]);
    assert_eq!(chosen(&config(ModuleSelector::AllLinear)).unwrap().len(), 6);
    let by_regex = |pattern: &str| chosen(&config(ModuleSelector::Regex(pattern.into())));
    assert_eq!(by_regex(r".*\.(q|v)_proj").unwrap().len(), 4);
    assert!(
        by_regex(r"q_proj")
            .unwrap_err()
            .contains("these would: down_proj, lm_head, q_proj, v_proj")
    );

    let mut some = config(names(&["q_proj", "down_proj"]));
    some.exclude_modules = Some(names(&["0.self_attn.q_proj"]));
    assert_eq!(
        chosen(&some).unwrap(),
        ["0.mlp.down_proj", "1.self_attn.q_proj", "1.mlp.down_proj"]
    );
    some.exclude_modules = Some(ModuleSelector::Regex(r".*mlp.*".into()));
    some.layers_to_transform = Some(vec![1]);
    assert_eq!(chosen(&some).unwrap(), ["1.self_attn.q_proj"]);
    some.layers_pattern = vec!["layers".into()];
    assert_eq!(chosen(&some).unwrap(), ["1.self_attn.q_proj"]);
    some.layers_pattern = vec!["blocks".into()];
    assert!(
        chosen(&some)
            .unwrap_err()
            .contains("chooses no linear module")
    );
}

#[test]
fn patterns_match_the_end_of_a_path_and_the_first_counts() {
    let mut some = config(ModuleSelector::AllLinear);
    some.rank_pattern = vec![
        ("1.self_attn.q_proj".into(), 2),
        ("q_proj|down_proj".into(), 8),
    ];
    some.alpha_pattern = vec![("^model.layers.0.*".into(), 16.0)];
    let targets = some.resolve(&two_layers()).unwrap();
    let of = |module: &str| {
        let target = targets
            .iter()
            .find(|target| target.module.ends_with(module))
            .unwrap();
        (target.rank, target.scaling)
    };
    assert_eq!(of("0.self_attn.q_proj"), (8, 2.0));
    assert_eq!(of("1.self_attn.q_proj"), (2, 4.0));
    assert_eq!(of("1.mlp.down_proj"), (8, 1.0));
    assert_eq!(of("0.self_attn.v_proj"), (4, 4.0));
    some.use_rslora = true;
    assert_eq!(some.resolve(&two_layers()).unwrap()[1].scaling, 8.0);
}

#[test]
fn what_fits_nothing_is_an_error_that_says_what_would() {
    let error = chosen(&config(names(&["q_proj", "k_proj"]))).unwrap_err();
    assert!(
        error.contains(
            "\"k_proj\" fits no linear module; these would: down_proj, lm_head, q_proj, v_proj"
        ),
        "{error}"
    );
    let mut some = config(names(&["q_proj"]));
    some.rank_pattern = vec![("down_proj".into(), 2)];
    assert!(
        chosen(&some)
            .unwrap_err()
            .contains("`rank_pattern` \"down_proj\" fits no adapted module; these would: q_proj")
    );
    some.rank_pattern.clear();
    some.layers_to_transform = Some(vec![0, 7]);
    assert!(
        chosen(&some)
            .unwrap_err()
            .contains("`layers_to_transform` 7")
    );
    assert!(
        chosen(&config(ModuleSelector::Regex("(".into())))
            .unwrap_err()
            .contains("`target_modules` is no regular expression")
    );
    assert!(
        chosen(&config(ModuleSelector::Regex("(?!x)".into())))
            .unwrap_err()
            .contains("look-around")
    );
}

/// What a configuration on the tied model `lora-head-tied`, or another case, is refused for.
fn refused(case: &str, change: impl FnOnce(&mut AdapterConfig)) -> String {
    let modules = modules_of(&own_cases().join(case).join("base"));
    let mut some = config(names(&["v_proj"]));
    if case.starts_with("gpt2") {
        some.target_modules = names(&["c_attn"]);
    }
    change(&mut some);
    let refused = some.resolve(&modules).expect_err("a refusal");
    refused.to_string()
}

#[test]
fn what_peft_refuses_or_does_nothing_for_is_refused_by_key() {
    let list = |list: &[&str]| {
        list.iter()
            .map(|name| (*name).to_owned())
            .collect::<Vec<_>>()
    };
    let said = refused("trainable-tokens", |c| c.bias = TrainedBiases::All);
    assert!(said.contains("`bias` \"all\" finds no bias"), "{said}");
    let said = refused("trainable-tokens", |c| c.modules_to_save = list(&["score"]));
    assert!(
        said.contains("`modules_to_save` \"score\" fits no module"),
        "{said}"
    );
    // By the plain end of a path, the norms' too.
    let said = refused("trainable-tokens", |c| {
        c.modules_to_save = list(&["proj"]);
        c.target_modules = ModuleSelector::AllLinear;
    });
    assert!(
        said.contains("has an update and is in `modules_to_save`"),
        "{said}"
    );
    let said = refused("gpt2-bias-all", |c| c.modules_to_save = list(&["mlp.c_fc"]));
    assert!(said.contains("GPT-2's Conv1D"), "{said}");
    let said = refused("gpt2-bias-all", |c| {
        c.modules_to_save = list(&["ln_f"]);
        c.bias = TrainedBiases::All;
    });
    assert!(said.contains("PEFT keeps two of it"), "{said}");
    let said = refused("trainable-tokens", |c| {
        c.target_modules = names(&["embed_tokens"]);
        c.use_dora = true;
    });
    assert!(said.contains("DoRA on an embedding"), "{said}");
    let said = refused("trainable-tokens", |c| {
        c.target_modules = names(&["embed_tokens"]);
        c.lora_bias = true;
    });
    assert!(said.contains("`lora_bias` is not for embeddings"), "{said}");
    let tokens = |of: &str, indices: &[u32]| {
        let of = of.to_owned();
        let indices = indices.to_vec();
        move |c: &mut AdapterConfig| {
            c.trainable_token_indices = TrainedTokens::ByModule(vec![(of, indices)]);
        }
    };
    let said = refused("trainable-tokens", tokens("embed_tokens", &[3, 64]));
    assert!(
        said.contains("there are 64 tokens, so none is 64"),
        "{said}"
    );
    let said = refused("trainable-tokens", tokens("embed_tokens", &[3, 3]));
    assert!(said.contains("3 stands in it twice"), "{said}");
    let said = refused("trainable-tokens", tokens("o_proj", &[3]));
    assert!(
        said.contains("no embedding and not the output head"),
        "{said}"
    );
    let said = refused("trainable-tokens", tokens("wte", &[3]));
    assert!(
        said.contains("`trainable_token_indices` \"wte\" fits no module"),
        "{said}"
    );
    let said = refused("trainable-tokens", |c| {
        c.trainable_token_indices = TrainedTokens::Embedding(vec![1]);
        c.modules_to_save = list(&["embed_tokens"]);
    });
    assert!(said.contains("PEFT does one of them"), "{said}");
}

#[test]
fn fresh_weights_follow_pefts_rule() {
    let device = Device::cpu();
    let linear = [module_of("a", 400, 30), module_of("b", 400, 30)];
    let fresh = |init: InitLoraWeights, linear: &[Module], seed: u64| {
        let mut config = AdapterConfig::new(25, 8.0, ModuleSelector::AllLinear);
        config.init_lora_weights = init;
        let adapter = Adapter::new(config, linear, &device, seed, None).unwrap();
        let lora = &adapter.modules["b"];
        assert_eq!(
            (&lora.a.shape()[..], &lora.b.shape()[..]),
            (&[25, 400][..], &[30, 25][..])
        );
        (lora.a.to_f32_vec().unwrap(), lora.b.to_f32_vec().unwrap())
    };
    let deviation = |values: &[f32]| {
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64;
        (values
            .iter()
            .map(|&v| (f64::from(v) - mean).powi(2))
            .sum::<f64>()
            / values.len() as f64)
            .sqrt()
    };
    // Of 10,000 values (750 for B), the deviation is within 3 % (10 %) of the distribution's with certainty.
    let close = |found: f64, wanted: f64, tolerance: f64| {
        assert!(
            (found / wanted - 1.0).abs() < tolerance,
            "{found} for {wanted}"
        )
    };
    let within = |values: &[f32], bound: f32| {
        values.iter().all(|v| v.abs() <= bound) && values.iter().any(|v| v.abs() > 0.98 * bound)
    };

    let (a, b) = fresh(InitLoraWeights::KaimingUniform, &linear, 1);
    assert!(within(&a, 1.0 / 20.0) && b.iter().all(|&v| v == 0.0));
    close(deviation(&a), 1.0 / 20.0 / 3f64.sqrt(), 0.03);
    let (a, b) = fresh(InitLoraWeights::Gaussian, &linear, 1);
    assert!(b.iter().all(|&v| v == 0.0));
    close(deviation(&a), 1.0 / 25.0, 0.03);
    // 4.6 % of a normal distribution lie beyond two deviations, none of a uniform one.
    let beyond = a.iter().filter(|v| v.abs() > 2.0 / 25.0).count() as f64 / a.len() as f64;
    close(beyond, 0.0455, 0.2);
    let (a, b) = fresh(InitLoraWeights::RandomBoth, &linear, 1);
    assert!(within(&a, 1.0 / 20.0) && within(&b, 1.0 / 5.0));
    close(deviation(&b), 1.0 / 5.0 / 3f64.sqrt(), 0.1);

    let first = fresh(InitLoraWeights::KaimingUniform, &linear, 1).0;
    assert_eq!(
        first,
        fresh(InitLoraWeights::KaimingUniform, &linear[1..], 1).0,
        "other modules do not matter"
    );
    assert_ne!(first, fresh(InitLoraWeights::KaimingUniform, &linear, 2).0);
    let same_shape =
        Adapter::new(config(ModuleSelector::AllLinear), &linear, &device, 1, None).unwrap();
    assert_ne!(
        same_shape.modules["a"].a.to_f32_vec().unwrap(),
        same_shape.modules["b"].a.to_f32_vec().unwrap()
    );
    assert_eq!(same_shape.parameter_count(), 2 * 4 * 430);
}

#[test]
fn configurations_of_other_versions_keep_their_keys() {
    let old = json!({ "peft_type": "LORA", "r": 16, "lora_alpha": 32.5, "target_modules": ["q_proj"], "lora_dropout": 0.05, "from_the_future": [1] });
    let config = AdapterConfig::from_json(&old).unwrap();
    assert_eq!(
        (config.rank, config.alpha, config.dropout),
        (16, 32.5, 0.05)
    );
    assert_eq!(config.init_lora_weights, InitLoraWeights::KaimingUniform);
    let written = config.to_json();
    for (key, value) in old.as_object().unwrap() {
        assert_eq!(&written[key], value);
    }
    assert_eq!(written.as_object().unwrap().len(), 42);
    assert_eq!(
        AdapterConfig::from_json(&written).unwrap().to_json(),
        written
    );
}

#[test]
fn configurations_that_make_no_sense_are_refused_by_key() {
    let good = json!({ "peft_type": "LORA", "target_modules": "all-linear" });
    AdapterConfig::from_json(&good).unwrap();
    let cases = [
        ("peft_type", json!("IA3")),
        ("r", json!(0)),
        ("r", json!(-1)),
        ("r", json!(1u64 << 40)),
        ("r", json!("8")),
        ("lora_alpha", json!("16")),
        ("lora_dropout", json!(1.0)),
        ("lora_dropout", json!(-0.1)),
        ("target_modules", Value::Null),
        ("target_modules", json!([1])),
        ("rank_pattern", json!({ "q_proj": 0 })),
        ("alpha_pattern", json!([])),
        ("layers_to_transform", json!([-1])),
        ("layers_to_transform", json!([1])),
        ("layers_pattern", json!("layers")),
        ("init_lora_weights", json!("corda")),
        ("init_lora_weights", json!("pissa_niter_")),
        ("use_rslora", json!(1)),
        ("bias", json!("some")),
        ("modules_to_save", json!([1])),
        ("use_dora", json!("yes")),
        ("lora_bias", json!("yes")),
        ("trainable_token_indices", json!([-1])),
        ("trainable_token_indices", json!({ "embed_tokens": 1 })),
        ("target_parameters", json!(["w"])),
        ("layer_replication", json!([[0, 1]])),
        ("use_qalora", json!(true)),
    ];
    for (key, value) in cases {
        let mut json = good.clone();
        json[key] = value;
        let error = AdapterConfig::from_json(&json).unwrap_err().to_string();
        assert!(error.contains(&format!("`{key}`")), "{key}: {error}");
    }
    assert!(AdapterConfig::from_json(&json!([])).is_err());
}

/// An adapter on `two_layers` in a folder.
fn written() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let adapter = Adapter::new(
        config(names(&["q_proj"])),
        &two_layers(),
        &Device::cpu(),
        5,
        None,
    )
    .unwrap();
    adapter.write(folder.path()).unwrap();
    folder
}

fn refusal(folder: &Path, linear: &[Module]) -> String {
    Adapter::read(folder, linear, &Device::cpu())
        .err()
        .expect("a refusal")
        .to_string()
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let folder = written();
    let a = "`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`";
    let mut other = two_layers();
    other[0].in_features = 20;
    let error = refusal(folder.path(), &other);
    assert!(
        error.contains(a) && error.contains("has shape [4, 16]") && error.contains("want [4, 20]"),
        "{error}"
    );

    let path = folder.path().join("adapter_config.json");
    let set = |key: &str, value: Value| {
        let mut json = read_json(&path);
        json[key] = value;
        fs::write(&path, json.to_string()).unwrap();
    };
    set("target_modules", json!(["q_proj", "v_proj"]));
    let error = refusal(folder.path(), &two_layers());
    assert!(
        error.contains("layers.0.self_attn.v_proj.lora_A.weight`: is missing")
            && error.contains("[4, 16]"),
        "{error}"
    );
    set("target_modules", json!(["0.self_attn.q_proj"]));
    let error = refusal(folder.path(), &two_layers());
    assert!(
        error.contains("layers.1.self_attn.q_proj.lora_A.weight`: belongs to no module"),
        "{error}"
    );
    assert!(
        error.contains(
            "a name such as base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        ),
        "{error}"
    );

    fs::remove_file(folder.path().join("adapter_model.safetensors")).unwrap();
    assert!(refusal(folder.path(), &two_layers()).contains("holds no adapter_model.safetensors"));
    fs::write(folder.path().join("adapter_model.bin"), "").unwrap();
    assert!(
        refusal(folder.path(), &two_layers())
            .contains("adapter_model.bin is a format that can run code")
    );
    fs::remove_file(&path).unwrap();
    assert!(refusal(folder.path(), &two_layers()).contains("holds no adapter_config.json"));
    assert!(refusal(&path, &two_layers()).contains("is no folder"));
}

#[test]
fn writing_over_an_adapter_keeps_a_users_files() {
    let folder = written();
    fs::write(folder.path().join("README.md"), "mine").unwrap();
    let adapter = Adapter::read(folder.path(), &two_layers(), &Device::cpu()).unwrap();
    // Its tensors are copies: the files they came from may go.
    adapter.write(folder.path()).unwrap();
    let again = Adapter::read(folder.path(), &two_layers(), &Device::cpu()).unwrap();
    for (module, lora) in &adapter.modules {
        assert_eq!(
            lora.a.to_f32_vec().unwrap(),
            again.modules[module].a.to_f32_vec().unwrap()
        );
    }
    assert_eq!(
        fs::read_to_string(folder.path().join("README.md")).unwrap(),
        "mine"
    );
}

proptest! {
    #[test]
    fn mutated_adapters_never_panic(at in 0usize..4000, value: u8, in_config: bool, cut in 0usize..8000) {
        const FILES: [&str; 2] = ["adapter_model.safetensors", "adapter_config.json"];
        static GOOD: OnceLock<[Vec<u8>; 2]> = OnceLock::new();
        let mut files = GOOD
            .get_or_init(|| {
                let folder = written();
                FILES.map(|name| fs::read(folder.path().join(name)).unwrap())
            })
            .clone();
        let bytes = &mut files[usize::from(in_config)];
        let len = bytes.len();
        bytes[at % len] = value;
        bytes.truncate(cut.min(len));
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in FILES.iter().zip(&files) {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        let _ = Adapter::read(folder.path(), &two_layers(), &Device::cpu());
    }
}
