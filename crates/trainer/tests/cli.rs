//! The program from outside: help, documentation, and what wrong input gets.

use std::{fs, path::Path};

use assert_cmd::Command;
use clap::CommandFactory;
use fuselora_trainer::cli::Cli;

/// Lines of a terminal that fills a laptop's screen.
const SCREEN: usize = 50;
const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/cli.md");

fn fuselora() -> Command {
    Command::new(env!("CARGO_BIN_EXE_fuselora"))
}

/// The one line that a mistake puts on standard error, and exit code 2.
fn complaint(arguments: &[&str]) -> String {
    let output = fuselora()
        .args(arguments)
        .assert()
        .code(2)
        .get_output()
        .clone();
    String::from_utf8(output.stderr).unwrap()
}

fn help(name: &str, flag: &str) -> String {
    let output = fuselora()
        .args(name.split(' '))
        .arg(flag)
        .assert()
        .success()
        .get_output()
        .clone();
    String::from_utf8(output.stdout).unwrap()
}

/// Every command, those of a group behind its name.
fn commands() -> Vec<String> {
    let mut names = Vec::new();
    for command in Cli::command().get_subcommands() {
        let name = command.get_name();
        names.extend(
            command
                .get_subcommands()
                .map(|of| format!("{name} {}", of.get_name())),
        );
        if !command.has_subcommands() {
            names.push(name.to_string());
        }
    }
    names
}

#[test]
fn every_help_fits_a_screen_and_shows_an_example() {
    for name in commands() {
        let help = help(&name, "--help");
        let lines = help.lines().count();
        assert!(lines <= SCREEN, "{name}: {lines} lines");
        assert!(
            help.contains(&format!("Example:\n  fuselora {name} ")),
            "{name}"
        );
        let all = self::help(&name, "--help-all");
        let widest = all.lines().map(str::len).max().unwrap_or(0);
        assert!(widest <= 120, "{name}: {widest} columns");
    }
}

#[test]
fn the_rarer_flags_are_in_the_whole_help() {
    assert!(!help("train", "--help").contains("--adam-beta1"));
    assert!(help("train", "--help-all").contains("--adam-beta1"));
    assert!(help("train", "--help").contains("--help-all"));
}

/// `FUSELORA_UPDATE_DOCS=1 cargo test -p fuselora-trainer` rewrites the document.
#[test]
fn the_document_is_what_help_says() {
    let mut document = "# The command line\n\nWhat `fuselora COMMAND --help-all` prints; `--help` leaves out the rarer flags. `fuselora train` also takes \
                        `--config file.toml`, whose keys are the flags without their dashes; flags given beside it win, \
                        and every run writes its own as `run.toml`.\n"
        .to_string();
    for name in commands() {
        document += &format!(
            "\n## fuselora {name}\n\n```text\n{}```\n",
            help(&name, "--help-all")
        );
    }
    if std::env::var_os("FUSELORA_UPDATE_DOCS").is_some() {
        fs::create_dir_all(Path::new(DOCUMENT).parent().unwrap()).unwrap();
        fs::write(DOCUMENT, &document).unwrap();
    }
    let written = fs::read_to_string(DOCUMENT).unwrap_or_default();
    assert!(
        written == document,
        "docs/cli.md is out of step: run with FUSELORA_UPDATE_DOCS=1"
    );
}

#[test]
fn wrong_values_name_the_flag() {
    let cases = [
        (vec!["train", "--batch-size", "0"], "--batch-size"),
        (vec!["train", "--learning-rate=-1"], "--learning-rate"),
        (vec!["train", "--lora-dropout", "1"], "--lora-dropout"),
        (vec!["train", "--lr-scheduler", "cosin"], "'cosine'"),
        (vec!["train", "--learning-rat", "1"], "'--learning-rate'"),
        (
            vec!["train", "--device", "tpu"],
            "there are cpu, cuda, cuda:N, sim and auto",
        ),
        (
            vec!["train", "--bnb-4bit-blocksize", "48"],
            "a power of two from 32 to 4096",
        ),
        (
            vec!["train", "--bnb-4bit-quant-type", "fp4"],
            "--bnb-4bit-quant-type",
        ),
        (vec!["generate", "--model", "m"], "--prompt"),
        (vec!["trian"], "'train'"),
        (
            vec!["train", "--config", "/nowhere.toml"],
            "/nowhere.toml cannot be read",
        ),
    ];
    for (arguments, expected) in cases {
        let message = complaint(&arguments);
        assert!(
            message.starts_with("error: ") && message.contains(expected),
            "{arguments:?}: {message}"
        );
    }
}

#[test]
fn a_file_that_is_no_gguf_is_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let (model, output) = (folder.path().join("model.gguf"), folder.path().join("out"));
    fs::write(&model, "not a model").unwrap();
    let message = complaint(&[
        "convert",
        "--model",
        model.to_str().unwrap(),
        "--output",
        output.to_str().unwrap(),
    ]);
    assert_eq!(message.lines().count(), 1, "{message}");
    assert!(
        message.starts_with("error: ") && message.contains("model.gguf"),
        "{message}"
    );
    assert!(!output.exists());
}

#[test]
fn a_missing_model_is_named() {
    let message = complaint(&[
        "convert",
        "--model",
        "/nowhere.gguf",
        "--output",
        "/tmp/never",
    ]);
    assert!(message.contains("/nowhere.gguf"), "{message}");
}

#[test]
fn adapters_are_combined_and_mistakes_are_said() {
    let parity = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity");
    let (base, adapter) = (
        parity.join("linear-rope/base"),
        parity.join("linear-rope/adapter-trained"),
    );
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("both");
    let paths = [&base, &adapter, &adapter, &output].map(|path| path.to_str().unwrap());
    let mut arguments = vec![
        "adapter",
        "combine",
        "--model",
        paths[0],
        "--adapter",
        paths[1],
    ];
    arguments.extend([
        "--adapter",
        paths[2],
        "--output",
        paths[3],
        "--combination-type=cat",
    ]);
    let said = complaint(&[&arguments[..], &["--weights=1"]].concat());
    assert!(
        said.contains("--weights has 1 numbers for 2 adapters"),
        "{said}"
    );
    let said = complaint(&[&arguments[..], &["--weights=1,1", "--svd-rank=3"]].concat());
    assert!(said.contains("--svd-rank is for"), "{said}");
    assert!(!output.exists());
    let combine = [&arguments[..], &["--weights", "-0.5,1"]].concat();
    fuselora().args(combine).assert().success();
    let config = fs::read_to_string(output.join("adapter_config.json")).unwrap();
    assert!(config.contains("\"r\": 8"), "{config}");
}

#[test]
fn adapters_are_listed_converted_and_compared() {
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/linear-rope");
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let [base, adapter] = ["base", "adapter-trained"].map(|name| path(&case.join(name)));
    let folder = tempfile::tempdir().unwrap();
    let output = |name: &str| path(&folder.path().join(name));
    let said = |arguments: &[&str]| {
        let run = fuselora().arg("adapter").args(arguments).assert().success();
        String::from_utf8(run.get_output().stdout.clone()).unwrap()
    };
    for (format, name) in [("gguf", "a.gguf"), ("mlx", "b")] {
        let written = output(name);
        let arguments = ["--adapter", &adapter, "--to", format, "--output", &written];
        let text = said(&[&["convert", "--model", &base], &arguments[..]].concat());
        assert!(text.contains("14 modules"), "{text}");
        let text = said(&["diff", "--model", &base, &adapter, &written]);
        assert!(text.contains("14 of 14 are the same"), "{text}");
    }
    let initial = path(&case.join("adapter-initial"));
    let text = said(&["diff", "--json", "--model", &base, &adapter, &initial]);
    let found: serde_json::Value = serde_json::from_str(&text).unwrap();
    let modules = found["modules"].as_array().unwrap();
    assert!(
        modules
            .iter()
            .all(|module| module["relative"].as_f64().unwrap() > 0.01),
        "{text}"
    );

    fs::write(folder.path().join("notes.txt"), "no adapter").unwrap();
    fs::write(folder.path().join("c.gguf"), "GGUF").unwrap();
    let listed = fuselora()
        .args(["adapter", "list", "--json"])
        .arg(folder.path())
        .assert();
    let listed = listed.success().get_output().clone();
    let found: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    let formats: Vec<_> = found
        .as_array()
        .unwrap()
        .iter()
        .map(|one| &one["format"])
        .collect();
    assert_eq!(formats, ["GGUF", "mlx-lm"]);
    assert_eq!(found[0]["parameters"], found[1]["parameters"]);
    let warned = String::from_utf8(listed.stderr).unwrap();
    assert!(
        warned.contains("c.gguf") && !warned.contains("notes"),
        "{warned}"
    );
    let text = said(&["list", &adapter, &output("b")]);
    assert_eq!(text.lines().count(), 3, "{text}");

    let message = complaint(&["adapter", "list", &output("notes.txt")]);
    assert!(message.contains("is no adapter: give"), "{message}");
    let message = complaint(&["adapter", "diff", "--model", &base, &adapter]);
    assert!(message.contains("<SECOND>"), "{message}");
    let arguments = ["--to", "gguf", "--output", &output("b")];
    let arguments = [&["--model", &base, "--adapter", &adapter], &arguments[..]].concat();
    let message = complaint(&[&["adapter", "convert"], &arguments[..]].concat());
    assert!(message.contains("is a folder; give --output"), "{message}");
}

/// The loss that is told last is the one of the checkpoint that was written.
#[test]
fn merging_into_4_bits_says_what_it_changes() {
    let case = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/parity/linear-rope"
    );
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (float, adapter) = (format!("{case}/base"), format!("{case}/adapter-trained"));
    let rows = format!("{case}/train.jsonl");
    let (base, merged) = (path("base"), path("merged"));
    let run = |arguments: &[&str]| {
        let output = fuselora().args(arguments).assert().success();
        String::from_utf8(output.get_output().stdout.clone()).unwrap()
    };
    run(&["quantize", "--model", &float, "--output", &base]);
    let rest = [
        "--requantize",
        "--adapter",
        &adapter,
        "--output",
        &merged,
        "--data",
        &rows,
    ];
    let refused = complaint(&[&["merge", "--model", &float], &rest[..]].concat());
    assert!(refused.contains("is not in NF4"), "{refused}");
    let told = run(&[&["merge", "--model", &base], &rest[..]].concat());
    assert!(told.contains("\nmodel.layers.1.mlp.down_proj "), "{told}");
    let loss = |arguments: &[&str]| {
        let common = ["eval", "--json", "--data", &rows];
        let found: serde_json::Value =
            serde_json::from_str(&run(&[&common, arguments].concat())).unwrap();
        found["loss"].as_f64().unwrap()
    };
    let before = loss(&["--model", &base, "--adapter", &adapter]);
    let after = loss(&["--model", &merged]);
    assert_ne!(format!("{before:.4}"), format!("{after:.4}"));
    let line = format!("loss {before:.4} with the adapter beside its base, {after:.4} requantized");
    assert!(told.contains(&line), "{told}");
}

const PARITY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/parity");

/// What the program prints, a JSON object a line.
fn json_lines(arguments: &[&str]) -> Vec<serde_json::Value> {
    let output = fuselora().args(arguments).assert().success();
    let text = String::from_utf8(output.get_output().stdout.clone()).unwrap();
    let lines = text.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Rows with adapters of their own lose what they lose with each adapter alone.
#[test]
fn rows_name_their_adapters() {
    let folder = tempfile::tempdir().unwrap();
    let base = format!("{PARITY}/linear-rope/base");
    let adapters =
        ["linear-rope", "layers-pattern"].map(|case| format!("{PARITY}/{case}/adapter-trained"));
    let named = [("first", &adapters[0]), ("second", &adapters[1])]
        .map(|(name, folder)| format!("{name}={folder}"));
    let several = [
        "--model",
        &base,
        "--adapter",
        &named[0],
        "--adapter",
        &named[1],
    ];
    let row = |ids: [u32; 5], adapter: &str| {
        format!("{{\"input_ids\": {ids:?}, \"adapter\": \"{adapter}\"}}\n")
    };
    let (one, two, three) = ([3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [2, 7, 1, 8, 2]);
    let write = |name: &str, content: &str| {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let loss = |arguments: &[&str], data: &str| {
        let found = json_lines(&[&["eval", "--json", "--data", data], arguments].concat());
        found[0]["loss"].as_f64().unwrap()
    };
    let alone = [
        (one, Some(&adapters[0])),
        (two, Some(&adapters[1])),
        (three, None),
    ]
    .map(|(ids, adapter)| {
        let data = write("one.jsonl", &row(ids, "any"));
        let mut arguments = vec!["--model", &base];
        arguments.extend(adapter.iter().flat_map(|folder| ["--adapter", folder]));
        loss(&arguments, &data)
    });
    let rows = row(one, "first") + &row(two, "second") + &row(three, "__base__");
    let together = loss(&several, &write("all.jsonl", &rows));
    let mean = alone.iter().sum::<f64>() / 3.0;
    assert!(
        (together - mean).abs() < 1e-6 * mean,
        "{together} and {mean}"
    );
    assert!((alone[0] - alone[2]).abs() > 1e-3, "{alone:?}");

    let data = write("unknown.jsonl", &row(one, "third"));
    let said = complaint(&[&["eval", "--data", &data], &several[..]].concat());
    assert!(
        said.contains("there is no adapter third: there are first, second and __base__"),
        "{said}"
    );
    let said = complaint(&[
        "eval",
        "--data",
        &data,
        "--model",
        &base,
        "--adapter",
        &adapters[0],
        "--adapter",
        &adapters[1],
    ]);
    assert!(said.contains("several adapters need names"), "{said}");
}

/// Prompts of a file get the answers that each gets alone.
#[test]
fn prompts_name_their_adapters() {
    let folder = tempfile::tempdir().unwrap();
    let base = format!("{PARITY}/linear-rope/base");
    let named = [("first", "linear-rope"), ("second", "layers-pattern")]
        .map(|(name, case)| format!("{name}={PARITY}/{case}/adapter-trained"));
    let common = [
        "generate",
        "--model",
        &base,
        "--adapter",
        &named[0],
        "--adapter",
        &named[1],
        "--temperature=0",
        "--max-new-tokens=6",
    ];
    let asked = [
        ("first", "3,1,4"),
        ("__base__", "1,5,9,2"),
        ("second", "6"),
        ("first", "5,3"),
    ];
    let lines = asked
        .map(|(adapter, ids)| format!("{{\"prompt_ids\": [{ids}], \"adapter\": \"{adapter}\"}}\n"));
    let prompts = folder.path().join("prompts.jsonl");
    fs::write(&prompts, lines.concat()).unwrap();
    let together = json_lines(&[&common[..], &["--prompts", prompts.to_str().unwrap()]].concat());
    for ((adapter, ids), answer) in asked.iter().zip(&together) {
        let alone = json_lines(
            &[
                &common[..],
                &["--json", "--adapter-name", adapter, "--prompt-ids", ids],
            ]
            .concat(),
        );
        assert_eq!(answer["tokens"], alone[0]["tokens"], "{adapter}");
        assert_eq!(answer["adapter"], *adapter);
    }
    let said = complaint(&[&common[..], &["--prompt-ids=1"]].concat());
    assert!(said.contains("which adapter is not said"), "{said}");
    fs::write(&prompts, "{\"adapter\": \"first\"}\n").unwrap();
    let said = complaint(&[&common[..], &["--prompts", prompts.to_str().unwrap()]].concat());
    assert!(
        said.contains("line 1") && said.contains("`prompt` or `prompt_ids`"),
        "{said}"
    );
}
