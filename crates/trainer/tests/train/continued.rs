//! A stopped run continues to the bit.

use crate::{case, losses, own_case, train};
use std::fs;
use std::path::Path;

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
    let case = own_case("linear-rope");
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
