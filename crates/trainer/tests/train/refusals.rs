//! What broken input gets, and a full disk.

use crate::{case, complaint, train};
use assert_cmd::Command;
use std::fs;

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
