//! Training on the simulated GPU, and what stands where there is none.

use crate::{case, complaint, losses, own_case, train};
use std::fs;
use std::path::Path;

/// Every computation by a kernel, on the simulated GPU: the same numbers as on the CPU, and a run that continues to
/// the bit.
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

/// What adapters have besides low-rank updates of projections, on the simulated GPU as on the CPU, continued to the bit,
/// and merged there.
#[test]
fn kernels_train_every_part_of_an_adapter() {
    let cases: [(&str, &[&str]); 4] = [
        (
            "bias-dora-dropout",
            &["--bias=all", "--use-dora", "--lora-dropout=0.25"],
        ),
        (
            "gpt2-modules-to-save",
            &[
                "--target-modules=c_attn,c_fc",
                "--modules-to-save=wte,wpe,ln_f",
                "--use-dora",
            ],
        ),
        (
            "lora-embedding-tied",
            &[
                "--target-modules=v_proj,embed_tokens,lm_head",
                "--lora-dropout=0.1",
            ],
        ),
        (
            "trainable-tokens-tied",
            &[
                "--target-modules=q_proj,v_proj",
                "--trainable-token-indices=2,3,5",
                "--lora-bias",
                "--bias=lora_only",
            ],
        ),
    ];
    for (name, flags) in cases {
        let case = own_case(name);
        let folder = tempfile::tempdir().unwrap();
        let run = |name: &str, device: &str, more: &[&str]| {
            let output = folder.path().join(name);
            let mut command = train(&case.join("base"), &case.join("train.jsonl"), &output);
            command.args([
                "--learning-rate=3e-3",
                "--lr-scheduler=constant",
                "--batch-size=2",
            ]);
            command.args(["--device", device]);
            command.args(flags).args(more).assert().success();
            output
        };
        let cpu = run("cpu", "cpu", &["--steps=4"]);
        let kernels = run("kernels", "sim", &["--steps=4", "--dtype=f32"]);
        let pairs = losses(&kernels).into_iter().zip(losses(&cpu));
        assert_eq!(pairs.len(), 4);
        for ((step, loss, norm), (_, loss_cpu, norm_cpu)) in pairs {
            let error = f64::max((loss / loss_cpu - 1.0).abs(), (norm / norm_cpu - 1.0).abs());
            assert!(
                error < 1e-5,
                "{name}: step {step}: relative error {error:e}"
            );
        }
        run("resumed", "sim", &["--steps=2", "--dtype=f32"]);
        let resumed = run("resumed", "sim", &["--steps=4", "--dtype=f32", "--resume"]);
        assert_eq!(losses(&resumed), losses(&kernels), "{name}");
        let adapter = |folder: &Path| fs::read(folder.join("adapter_model.safetensors")).unwrap();
        assert!(
            adapter(&resumed) == adapter(&kernels),
            "{name}: the adapters differ"
        );

        // In 16 bits, where what is trained whole stays in f32 beside the activations.
        let narrow = run("narrow", "sim", &["--steps=4", "--dtype=bf16"]);
        let (_, loss, _) = losses(&narrow)[3];
        let (_, loss_cpu, _) = losses(&cpu)[3];
        let error = (loss / loss_cpu - 1.0).abs();
        assert!(error < 1e-2, "{name} in bf16: relative error {error:e}");
    }
}

/// Rows of two lengths make batches of three shapes, which come again and again with other content: captured as CUDA
/// graphs they give the numbers of a run that captures nothing, to the bit.
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
