//! Training from outside, on a small random checkpoint: what broken input gets, and that a stopped run
//! continues to the bit.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use assert_cmd::Command;

/// A case of the shared parity data; `None`, said plainly, where the data are not there.
fn case(name: &str) -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../../shared/parity")
        .join(name);
    if !folder.is_dir() {
        eprintln!("skipped: there is no {}", folder.display());
        return None;
    }
    Some(folder)
}

fn train(model: &Path, data: &Path, output: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fuselora"));
    command
        .arg("train")
        .arg("--model")
        .arg(model)
        .arg("--data")
        .arg(data)
        .arg("--output")
        .arg(output);
    command
}

/// What a run that the user has to mend says: one line, exit code 2.
fn complaint(command: &mut Command) -> String {
    let output = command.assert().code(2).get_output().clone();
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("error: "), "{message}");
    message
}

#[test]
fn bad_rows_name_file_and_line_and_write_nothing() {
    let Some(case) = case("llama-lora") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let (data, output) = (folder.path().join("rows.jsonl"), folder.path().join("out"));
    let good = "{\"input_ids\": [1, 2, 3]}\n";
    let cases = [
        (
            "{\"input_ids\": [1, 2",
            "rows.jsonl, line 2: malformed JSON",
        ),
        (
            "{\"input_ids\": \"1 2\"}",
            "rows.jsonl, line 2: `input_ids` must be an array of integers",
        ),
        (
            "{\"input_ids\": [1, 320000]}",
            "rows.jsonl, line 2: token 320000 is outside",
        ),
        (
            "{\"input_ids\": [1, 2], \"labels\": [-100, -100]}",
            "rows.jsonl, line 2: the row has no target tokens",
        ),
        (
            "{\"text\": \"hello\"}",
            "rows.jsonl, line 2: the row is text and the model has no tokenizer",
        ),
    ];
    for (row, expected) in cases {
        fs::write(&data, format!("{good}{row}\n")).unwrap();
        let message = complaint(&mut train(&case.join("base"), &data, &output));
        assert!(message.contains(expected), "{row}: {message}");
        assert!(!output.exists(), "{row}");
    }
}

#[test]
fn a_truncated_checkpoint_is_named() {
    let Some(case) = case("llama-lora") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("base");
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(case.join("base")).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        if path
            .extension()
            .is_some_and(|extension| extension == "safetensors")
        {
            bytes.truncate(bytes.len() / 2);
        }
        fs::write(model.join(path.file_name().unwrap()), bytes).unwrap();
    }
    let output = folder.path().join("out");
    let message = complaint(&mut train(&model, &case.join("train.jsonl"), &output));
    assert!(message.contains("model.safetensors"), "{message}");
    assert!(!output.exists());
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let (Some(case), Some(other)) = (case("llama-lora"), case("gpt2-lora")) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let mut command = train(&case.join("base"), &case.join("train.jsonl"), &output);
    let message = complaint(command.arg("--adapter").arg(other.join("adapter-initial")));
    assert!(message.contains("c_attn"), "{message}");
    assert!(!output.exists());
}

#[test]
fn a_target_that_matches_nothing_is_named() {
    let Some(case) = case("llama-lora") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let mut command = train(
        &case.join("base"),
        &case.join("train.jsonl"),
        &folder.path().join("out"),
    );
    let message = complaint(command.args(["--target-modules", "q_proj,q_prj"]));
    assert!(
        message.contains("q_prj") && message.contains("q_proj"),
        "{message}"
    );
}

#[test]
fn resuming_what_was_never_started_is_said() {
    let Some(case) = case("llama-lora") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let mut command = train(
        &case.join("base"),
        &case.join("train.jsonl"),
        &folder.path().join("out"),
    );
    let message = complaint(command.arg("--resume"));
    assert!(message.contains("out"), "{message}");
}

/// A limit on the size of files stands for a full disk: the write that goes beyond it fails.
#[cfg(unix)]
#[test]
fn a_full_disk_is_one_sentence_and_harms_nothing() {
    let Some(case) = case("llama-lora") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let run = |steps: &str| {
        let mut command = train(&case.join("base"), &case.join("train.jsonl"), &output);
        command.args(["--save-steps", "2", "--steps", steps]);
        command
    };
    run("2").assert().success();
    let saved = [
        "adapter_model.safetensors",
        "checkpoint/adapter_model.safetensors",
    ];
    let contents = || saved.map(|name| fs::read(output.join(name)).unwrap());
    let before = contents();
    let entries = || {
        let mut names: Vec<_> = fs::read_dir(&output)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        names
    };
    let files = entries();

    // Half of the adapter still fits; without a handler for the signal the program would be ended by it.
    let blocks = before[0].len() / 2 / 512;
    let mut limited = Command::new("sh");
    limited
        .args([
            "-c",
            &format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\""),
        ])
        .arg(env!("CARGO_BIN_EXE_fuselora"))
        .args(run("4").arg("--resume").get_args());
    let message = complaint(&mut limited);
    assert!(message.contains("adapter_model.safetensors"), "{message}");
    assert!(contents() == before, "what was saved has changed");
    assert_eq!(entries(), files);
}

#[cfg(unix)]
#[test]
fn a_run_stopped_by_ctrl_c_continues_to_the_bit() {
    use std::{process, thread, time::Duration};

    let Some(case) = case("llama-lora") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let (whole, stopped) = (folder.path().join("whole"), folder.path().join("stopped"));
    let settings = [
        "--steps",
        "300",
        "--batch-size",
        "3",
        "--lora-dropout",
        "0.1",
        "--lr-scheduler",
        "cosine",
    ];
    let run = |output: &Path| {
        let mut command = train(&case.join("base"), &case.join("train.jsonl"), output);
        command.args(settings);
        command
    };
    run(&whole).assert().success();

    let child = process::Command::new(env!("CARGO_BIN_EXE_fuselora"))
        .args(run(&stopped).get_args())
        .stdout(process::Stdio::piped())
        .stderr(process::Stdio::null())
        .spawn()
        .unwrap();
    let metrics = stopped.join("metrics.jsonl");
    while !fs::read(&metrics).is_ok_and(|lines| lines.len() > 400) {
        thread::sleep(Duration::from_millis(2));
    }
    let interrupted = process::Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(interrupted.success());
    let said = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    assert!(said.contains("stopped after step"), "{said}");
    let done = losses(&stopped).len();
    assert!((1..300).contains(&done), "{done} steps");

    run(&stopped).arg("--resume").assert().success();
    assert_eq!(losses(&stopped), losses(&whole));
    let adapter = |folder: &Path| fs::read(folder.join("adapter_model.safetensors")).unwrap();
    assert!(adapter(&stopped) == adapter(&whole), "the adapters differ");
}

/// The moments are in 8 bits where a parameter is large enough, and continue so.
#[test]
fn a_run_with_moments_in_8_bits_continues_to_the_bit() {
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/linear-rope");
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, optim: &str, steps: &[&str]| {
        let output = folder.path().join(name);
        let mut command = train(&case.join("base"), &case.join("train.jsonl"), &output);
        command.args(["--rank=256", "--learning-rate=0.01", "--optim", optim]);
        command
            .args(["--lr-scheduler=constant", "--steps"])
            .args(steps);
        command.assert().success();
        output
    };
    let whole = run("whole", "adamw_8bit", &["8"]);
    run("stopped", "adamw_8bit", &["4"]);
    let stopped = run("stopped", "adamw_8bit", &["8", "--resume"]);
    assert_eq!(losses(&stopped), losses(&whole));
    let file = |name: &str| {
        (
            fs::read(stopped.join(name)).unwrap(),
            fs::read(whole.join(name)).unwrap(),
        )
    };
    for name in [
        "adapter_model.safetensors",
        "checkpoint/optimizer.safetensors",
    ] {
        let (stopped, whole) = file(name);
        assert!(stopped == whole, "{name} differs");
    }
    let (state, _) = file("checkpoint/optimizer.safetensors");
    let state = safetensors::SafeTensors::deserialize(&state).unwrap();
    for (name, view) in state.tensors() {
        let large = view.shape().iter().product::<usize>() >= 4096;
        assert_eq!(view.dtype() == safetensors::Dtype::U8, large, "{name}");
    }

    let in_f32 = losses(&run("f32", "adamw_torch", &["8"]));
    let (_, first, _) = in_f32[0];
    let (_, last, _) = in_f32[7];
    let (_, last_in_8_bits, _) = losses(&whole)[7];
    assert!(last < first, "{first} to {last}");
    assert_ne!(last, last_in_8_bits);
    assert!(
        (last_in_8_bits - last).abs() < 0.05 * (first - last),
        "{last}, {last_in_8_bits} in 8 bits"
    );
}

/// Cases of this repository, with the flags that make their adapters anew.
const PEFT_CASES: [(&str, &[&str]); 19] = [
    (
        "bias-lora-only",
        &["--target-modules=q_proj,o_proj,up_proj", "--bias=lora_only"],
    ),
    (
        "gpt2-bias-all",
        &["--target-modules=c_attn,mlp.c_proj", "--bias=all"],
    ),
    (
        "bias-dora-dropout",
        &["--bias=all", "--use-dora", "--lora-dropout=0.25"],
    ),
    (
        "lora-bias",
        &[
            "--target-modules=q_proj,v_proj,up_proj",
            "--bias=lora_only",
            "--lora-bias",
        ],
    ),
    (
        "modules-to-save",
        &[
            "--target-modules=q_proj,v_proj",
            "--modules-to-save=norm,embed_tokens,lm_head,0.mlp",
        ],
    ),
    (
        "modules-to-save-tied",
        &[
            "--target-modules=q_proj,v_proj",
            "--modules-to-save=lm_head,k_norm",
        ],
    ),
    (
        "gpt2-modules-to-save",
        &["--target-modules=c_attn", "--modules-to-save=wte,wpe,ln_f"],
    ),
    (
        "lora-embedding",
        &[
            "--target-modules=q_proj,embed_tokens,lm_head",
            "--use-rslora",
        ],
    ),
    (
        "lora-embedding-tied",
        &["--target-modules=v_proj,embed_tokens"],
    ),
    ("lora-head-tied", &["--target-modules=v_proj,lm_head"]),
    ("gpt2-lora-embedding", &["--target-modules=c_attn,wte,wpe"]),
    (
        "trainable-tokens",
        &[
            "--target-modules=q_proj,v_proj",
            "--trainable-token-indices=embed_tokens=3,7,11;lm_head=5,7",
        ],
    ),
    (
        "trainable-tokens-tied",
        &[
            "--target-modules=q_proj,v_proj",
            "--trainable-token-indices=2,3,5,8,13",
        ],
    ),
    ("pissa", &["--init-lora-weights=pissa"]),
    (
        "gpt2-pissa",
        &[
            "--init-lora-weights=pissa",
            "--target-modules=c_attn,c_proj,c_fc",
        ],
    ),
    (
        "loraplus",
        &[
            "--target-modules=q_proj,down_proj,embed_tokens",
            "--bias=lora_only",
            "--modules-to-save=model.norm",
        ],
    ),
    (
        "gpt2-loraplus",
        &[
            "--target-modules=c_attn,c_proj,c_fc",
            "--use-dora",
            "--modules-to-save=ln_f",
        ],
    ),
    ("olora", &["--init-lora-weights=olora"]),
    ("loftq", &["--init-lora-weights=loftq", "--loftq-iter=2"]),
];

/// Flags of LoRA+, and what PEFT's function takes.
const LORAPLUS: [(&str, &str); 3] = [
    ("--loraplus-lr-ratio", "loraplus_lr_ratio"),
    ("--loraplus-lr-embedding", "loraplus_lr_embedding"),
    ("--weight-decay", "loraplus_weight_decay"),
];

/// Every tensor of a safetensors file.
fn tensors(file: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = fs::read(file).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    stored
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let values = view.data().as_chunks().0;
            (
                name,
                values.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            )
        })
        .collect()
}

/// From PEFT's first adapter: its loss curve, and its trained adapter by its names; in two parts, so that what is
/// saved between them must be whole. Then a new adapter of the same kind, which has the same tensors.
#[test]
fn adapters_are_trained_as_peft_trains_them() {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity");
    for (name, flags) in PEFT_CASES {
        let case = cases.join(name);
        let text = fs::read_to_string(case.join("expected.json")).unwrap();
        let expected: serde_json::Value = serde_json::from_str(&text).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let run = |output: &Path| {
            let mut command = train(&case.join("base"), &case.join("train.jsonl"), output);
            command.args([
                "--learning-rate=3e-3",
                "--lr-scheduler=constant",
                "--no-shuffle",
            ]);
            command.args(["--max-grad-norm=0", "--batch-size=4"]);
            let optimizer = &expected["optimizer"];
            for (flag, key) in LORAPLUS {
                if let Some(value) = optimizer.get(key) {
                    command.arg(format!("{flag}={value}"));
                }
            }
            command
        };
        let output = folder.path().join("continued");
        let continued = |steps: &str| {
            let mut command = run(&output);
            command.arg("--adapter").arg(case.join("adapter-initial"));
            command.args(["--steps", steps]);
            command
        };
        continued("2").assert().success();
        continued("5").arg("--resume").assert().success();
        for (step, loss, norm) in losses(&output) {
            let want = &expected["steps"][step as usize - 1];
            let error = |got: f64, key: &str| (got / want[key].as_f64().unwrap() - 1.0).abs();
            let error = error(loss, "loss").max(error(norm, "grad_norm"));
            assert!(
                error < 1e-4,
                "{name}: step {step}: relative error {error:e}"
            );
        }
        // Of a checkpoint: an adapter for use says what pissa and olora have changed since their beginning.
        let file = "checkpoint/adapter_model.safetensors";
        let got = tensors(&output.join(file));
        let want = tensors(&case.join("adapter-trained/adapter_model.safetensors"));
        assert!(got.keys().eq(want.keys()), "{name}: {:?}", got.keys());
        for (tensor, want) in &want {
            let square = |x: f32| f64::from(x) * f64::from(x);
            let mut difference: Vec<f64> = got[tensor]
                .iter()
                .zip(want)
                .map(|(g, w)| square(g - w))
                .collect();
            if tensor.ends_with("c_attn.base_layer.bias") {
                // Without rotary positions a bias of all keys changes no softmax: its gradient is rounding alone, of
                // which Adam makes whole steps. Queries and values are compared.
                let third = want.len() / 3;
                difference.drain(third..2 * third);
            }
            let error =
                difference.iter().sum::<f64>() / want.iter().map(|w| square(*w)).sum::<f64>();
            assert!(error.sqrt() < 2e-3, "{name}: {tensor}: {:e}", error.sqrt());
        }

        let fresh = folder.path().join("fresh");
        let mut command = run(&fresh);
        command
            .args(["--rank=4", "--lora-alpha=8", "--steps=1"])
            .args(flags);
        command.assert().success();
        let fresh = tensors(&fresh.join(file));
        assert!(fresh.keys().eq(want.keys()), "{name}: {:?}", fresh.keys());
    }
}

/// Step, loss and gradient norm of every training step, as written.
fn losses(folder: &Path) -> Vec<(u64, f64, f64)> {
    let lines = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    lines
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .filter(|line| line.get("loss").is_some())
        .map(|line| {
            let number = |name: &str| line[name].as_f64().unwrap();
            (
                line["step"].as_u64().unwrap(),
                number("loss"),
                number("grad_norm"),
            )
        })
        .collect()
}

/// Every computation by a kernel, on the simulated GPU: the same numbers as on the CPU, and a run that continues to
/// the bit.
#[cfg(feature = "cuda")]
#[test]
fn kernels_train_as_the_cpu_does() {
    let Some(case) = case("llama-lora") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, device: &str, steps: &str| {
        let output = folder.path().join(name);
        let mut command = train(&case.join("base"), &case.join("train.jsonl"), &output);
        command.args(["--device", device, "--dtype", "f32", "--steps", steps]);
        command.args(["--batch-size", "2", "--gradient-accumulation-steps", "2"]);
        command.args(["--lora-dropout", "0.1", "--lr-scheduler", "constant"]);
        (command, output)
    };
    let (mut on_cpu, cpu) = run("cpu", "cpu", "4");
    on_cpu.assert().success();
    let (mut whole, kernels) = run("kernels", "sim", "4");
    whole.assert().success();
    let pairs: Vec<_> = losses(&kernels).into_iter().zip(losses(&cpu)).collect();
    assert_eq!(pairs.len(), 4);
    for ((step, loss, norm), (_, loss_cpu, norm_cpu)) in pairs {
        let error = f64::max((loss / loss_cpu - 1.0).abs(), (norm / norm_cpu - 1.0).abs());
        assert!(error < 1e-5, "step {step}: relative error {error:e}");
    }

    let (mut first, resumed) = run("resumed", "sim", "2");
    first.assert().success();
    run("resumed", "sim", "4")
        .0
        .arg("--resume")
        .assert()
        .success();
    assert_eq!(losses(&resumed), losses(&kernels));
    let adapter = |folder: &Path| fs::read(folder.join("adapter_model.safetensors")).unwrap();
    assert!(
        adapter(&resumed) == adapter(&kernels),
        "the adapters differ"
    );
}

/// Rows of two lengths make batches of three shapes, which come again and again with other content: captured as CUDA
/// graphs they give the numbers of a run that captures nothing, to the bit.
#[cfg(feature = "cuda")]
#[test]
fn captured_passes_change_no_bit() {
    let Some(case) = case("llama-lora") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("rows.jsonl");
    let rows: String = (0..24)
        .map(|row| {
            let tokens = if row % 3 == 0 { 14 } else { 9 };
            let ids: Vec<usize> = (0..tokens).map(|i| (37 * row + i * i) % 300).collect();
            format!("{{\"input_ids\": {ids:?}}}\n")
        })
        .collect();
    fs::write(&data, rows).unwrap();
    let run = |name: &str, blocking: &str| {
        let output = folder.path().join(name);
        let mut command = train(&case.join("base"), &data, &output);
        command.env("CUDA_LAUNCH_BLOCKING", blocking);
        command.args(["--device", "sim", "--dtype", "f32", "--steps", "10"]);
        command.args(["--batch-size", "2", "--gradient-accumulation-steps", "2"]);
        command.args([
            "--lora-dropout",
            "0.1",
            "--lr-scheduler",
            "cosine",
            "--warmup-steps",
            "3",
        ]);
        command.args(["--max-grad-norm", "0.5", "--learning-rate", "1e-2"]);
        command.assert().success();
        output
    };
    let (usual, captured) = (run("usual", "1"), run("captured", "0"));
    assert_eq!(losses(&captured), losses(&usual));
    assert!(
        losses(&captured).iter().any(|&(_, _, norm)| norm > 0.5),
        "nothing is clipped"
    );
    for file in [
        "adapter_model.safetensors",
        "checkpoint/optimizer.safetensors",
    ] {
        let read = |folder: &Path| fs::read(folder.join(file)).unwrap();
        assert!(read(&captured) == read(&usual), "{file} differs");
    }
    // Of 20 passes, three shapes come for the first time.
    let report = |folder: &Path| fs::read_to_string(folder.join("report.html")).unwrap();
    assert!(!report(&usual).contains("CUDA graphs"));
    let report = report(&captured);
    let figure = report
        .split_once(" of 20</")
        .expect("the report counts graphs")
        .0;
    let graphs = figure.rsplit('>').next().unwrap().trim();
    assert!(graphs.parse::<u32>().unwrap() >= 12, "{graphs} of 20");
}

#[cfg(feature = "cuda")]
#[test]
fn a_device_that_is_not_there_is_one_sentence() {
    let Some(case) = case("llama-lora") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let run = |device: &str| {
        let mut command = train(&case.join("base"), &case.join("train.jsonl"), &output);
        command.args(["--device", device, "--steps", "1"]);
        command
    };
    // However many devices there are, there are not a thousand; without a driver there is none.
    let message = complaint(&mut run("cuda:1000"));
    assert!(
        message.contains("no CUDA driver was found")
            || message.contains("there is no device cuda:1000"),
        "{message}"
    );
    assert!(!output.exists());
    let message = complaint(&mut run("gpu"));
    assert!(message.contains("cuda:N, sim and auto"), "{message}");
}

/// A driver that is older than the kernels' PTX is named with what to do, before anything is computed.
#[cfg(feature = "cuda")]
#[test]
fn a_driver_that_is_too_old_is_one_sentence() {
    let Some(case) = case("llama-lora") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let mut command = train(
        &case.join("base"),
        &case.join("train.jsonl"),
        &folder.path().join("out"),
    );
    command.env("PTXSIM_DRIVER_VERSION", "12080");
    let message = complaint(command.args(["--device", "sim"]));
    let expected = "the NVIDIA driver supports CUDA 12.8, which is older than the kernels' PTX 9.0: update the driver";
    assert!(message.contains(expected), "{message}");
}

/// A rank that kernels do not take is refused before anything is computed.
#[cfg(feature = "cuda")]
#[test]
fn a_rank_above_a_devices_limit_is_one_sentence() {
    let Some(case) = case("llama-lora") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let mut command = train(&case.join("base"), &case.join("train.jsonl"), &output);
    let message = complaint(command.args(["--device", "sim", "--rank", "257"]));
    let expected = "has rank 257, and cuda:0 takes ranks up to 256: lower it, or use the CPU";
    assert!(message.contains(expected), "{message}");
    assert!(!output.exists());
}
