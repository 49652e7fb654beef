//! `--config file.toml`: the file's keys are read as flags that stand before the user's own.
//!
//! So there is one definition of names, types, defaults and limits, which is clap's.

use std::{ffi::OsString, fs, path::Path};

use anyhow::Context;
use clap::{CommandFactory, FromArgMatches};

use super::{Cli, Command};
use crate::mistake;

/// Below this Jaro-Winkler similarity a key is no plausible misspelling of another.
const SIMILAR: f64 = 0.75;

/// Parses the command line, `arguments` with the program's name first, and the configuration file that it
/// names.
///
/// # Errors
/// clap's own error for a wrong command line (its `exit` prints help and version too), or a
/// [`mistake::Mistake`] that names the configuration file and the key.
pub fn parse(arguments: Vec<OsString>) -> anyhow::Result<Cli> {
    if arguments.iter().any(|argument| argument == HELP_ALL) {
        return Err(help_all(arguments).into());
    }
    let cli = parse_flags(&arguments)?;
    let Command::Train(config) = &cli.command else {
        return Ok(cli);
    };
    let Some(file) = &config.config else {
        return Ok(cli);
    };
    let from_file = flags_of(file)?;
    // Once with the file's flags alone, so that its mistakes are told apart from the command line's.
    let program_and_command = &arguments[..2];
    let alone = [program_and_command, &from_file].concat();
    parse_flags(&alone).map_err(|error| mistake!("{}: {}", file.display(), sentence(&error)))?;
    Ok(parse_flags(&[&alone, &arguments[2..]].concat())?)
}

const HELP_ALL: &str = "--help-all";

/// The help of the command in `arguments` with every flag, which clap gives as an error.
fn help_all(arguments: Vec<OsString>) -> clap::Error {
    let asked = arguments.into_iter().map(|argument| match argument {
        all if all == HELP_ALL => "--help".into(),
        other => other,
    });
    let mut command = Cli::command()
        .mut_subcommands(|command| command.mut_args(|argument| argument.hide_short_help(false)));
    match command.try_get_matches_from_mut(asked) {
        Err(help) => help,
        Ok(_) => command.error(clap::error::ErrorKind::MissingSubcommand, "no command"),
    }
}

/// The first line of clap's message, without its "error: ".
fn sentence(error: &clap::Error) -> String {
    let message = error.render().to_string();
    let line = message.lines().next().unwrap_or_default();
    line.strip_prefix("error: ").unwrap_or(line).to_string()
}

fn parse_flags(arguments: &[OsString]) -> Result<Cli, clap::Error> {
    let matches = Cli::command().try_get_matches_from(arguments)?;
    Cli::from_arg_matches(&matches)
}

/// The file's keys as flags, `--key=value` each.
fn flags_of(file: &Path) -> anyhow::Result<Vec<OsString>> {
    let text =
        fs::read_to_string(file).with_context(|| format!("{} cannot be read", file.display()))?;
    let table: toml::Table = toml::from_str(&text).map_err(|error| {
        let line = error
            .span()
            .map_or(1, |span| text[..span.start].matches('\n').count() + 1);
        mistake!("{}, line {line}: {}", file.display(), error.message())
    })?;
    let known = known_keys()?;
    let mut flags = Vec::new();
    for (name, value) in &table {
        let key = name.replace('_', "-");
        if !known.contains(&key) {
            let nearest = known
                .iter()
                .map(|known| (strsim::jaro_winkler(known, &key), known))
                .max_by(|a, b| a.0.total_cmp(&b.0));
            let hint = match nearest {
                Some((similarity, nearest)) if similarity >= SIMILAR => {
                    format!("did you mean `{nearest}`?")
                }
                _ => "`fuselora train --help` lists the keys".to_string(),
            };
            return Err(mistake!(
                "{}: there is no key `{name}`; {hint}",
                file.display()
            ));
        }
        let value = flag_value(value).ok_or_else(|| {
            mistake!(
                "{}: `{name}` must be a number, a string, true or false, or a list of strings",
                file.display()
            )
        })?;
        flags.push(format!("--{key}={value}").into());
    }
    Ok(flags)
}

/// The names that a configuration file may use: those of `train`'s flags and their aliases.
fn known_keys() -> anyhow::Result<Vec<String>> {
    let command = Cli::command();
    let train = command
        .find_subcommand("train")
        .context("the command `train` is not defined")?;
    let mut names = Vec::new();
    for argument in train
        .get_arguments()
        .filter(|argument| argument.get_id() != "config")
    {
        names.extend(argument.get_long().map(str::to_string));
        names.extend(
            argument
                .get_all_aliases()
                .unwrap_or_default()
                .into_iter()
                .map(str::to_string),
        );
    }
    Ok(names)
}

fn flag_value(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        toml::Value::Boolean(flag) => Some(flag.to_string()),
        toml::Value::Array(items) => {
            let items: Option<Vec<&str>> = items.iter().map(toml::Value::as_str).collect();
            Some(items?.join(","))
        }
        toml::Value::Datetime(_) | toml::Value::Table(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cli::TrainConfig, mistake::exit_code, schedule::LrScheduler};

    fn train(config: &str, flags: &[&str]) -> anyhow::Result<TrainConfig> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.toml");
        fs::write(&path, config).unwrap();
        let mut arguments: Vec<OsString> = vec!["fuselora".into(), "train".into()];
        arguments.extend(flags.iter().map(Into::into));
        arguments.extend(["--config".into(), path.into_os_string()]);
        match parse(arguments)?.command {
            Command::Train(config) => Ok(TrainConfig {
                config: None,
                ..*config
            }),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let file = "model = \"m\"\nlearning_rate = 1\nrank = 4\niters = 7\nmask-prompt = false\n\
                    target-modules = [\"q_proj\", \"v_proj\"]\nlr-scheduler-type = \"cosine\"\nuse_rslora = true\n";
        let config = train(
            file,
            &[
                "--lora-r",
                "16",
                "--max-steps=9",
                "--mask-prompt",
                "--use-rslora=false",
            ],
        )
        .unwrap();
        assert_eq!(config.lora.rank, 16);
        assert_eq!(config.optimization.steps, Some(9));
        assert_eq!(config.optimization.learning_rate, 1.0);
        assert_eq!(config.optimization.lr_scheduler, LrScheduler::Cosine);
        assert_eq!(config.lora.target_modules, "q_proj,v_proj");
        assert!(config.rows.mask_prompt && !config.lora.use_rslora);
        assert_eq!(config.optimization.batch_size, 4);
    }

    #[test]
    fn the_written_configuration_repeats_the_run() {
        let flags = [
            "--model=a model",
            "--data=d",
            "--output=-o",
            "--learning-rate=1e-7",
            "--adam-epsilon=1e-300",
            "--target-modules=.*\\.(q|v)_proj",
            "--device=cuda:1",
            "--dtype=bfloat16",
            "--no-shuffle",
            "--steps=3",
            "--prompt-field=question",
            "--seed=9223372036854775807",
            "--gradient-checkpointing",
            "--eval-steps=2",
            "--bias=lora_only",
            "--modules-to-save=norm,lm_head",
            "--trainable-token-indices=embed_tokens=5,7;lm_head=7",
        ];
        let config = train("", &flags).unwrap();
        assert_eq!(train(&config.to_toml().unwrap(), &[]).unwrap(), config);
        let default = train("", &[]).unwrap();
        assert_eq!(train(&default.to_toml().unwrap(), &[]).unwrap(), default);
    }

    #[test]
    fn mistakes_in_the_file_name_file_and_key() {
        let cases = [
            (
                "learning-rat = 1",
                "run.toml: there is no key `learning-rat`; did you mean `learning-rate`?",
            ),
            (
                "zzz = 1",
                "run.toml: there is no key `zzz`; `fuselora train --help` lists the keys",
            ),
            (
                "rank = \"eight\"",
                "run.toml: invalid value 'eight' for '--rank <N>': it must be a whole number, 1 or more",
            ),
            (
                "batch_size = 0",
                "run.toml: invalid value '0' for '--batch-size <N>': it must be a whole number, 1 or more",
            ),
            ("rank = 8\nrank = 9", "run.toml, line 2: duplicate key"),
            ("[lora]\nrank = 8", "run.toml: there is no key `lora`"),
            ("rank = 1979-05-27", "run.toml: `rank` must be a number"),
            ("config = \"other.toml\"", "there is no key `config`"),
        ];
        for (file, expected) in cases {
            let error = train(file, &[]).unwrap_err();
            assert_eq!(exit_code(&error), 2);
            let message = format!("{error:#}");
            assert!(message.contains(expected), "{file}: {message}");
        }
    }

    #[test]
    fn an_unreadable_file_is_named() {
        let arguments = ["fuselora", "train", "--config", "/nowhere.toml"].map(OsString::from);
        let error = parse(arguments.to_vec()).unwrap_err();
        assert_eq!(exit_code(&error), 2);
        assert!(
            format!("{error:#}").starts_with("/nowhere.toml cannot be read: No such file"),
            "{error:#}"
        );
    }

    #[test]
    fn what_belongs_together_is_checked() {
        let complaint = |flags: &[&str]| {
            train("model = 'm'\ndata = 'd'\noutput = 'o'", flags)
                .unwrap()
                .validate()
        };
        assert!(complaint(&["--warmup-steps=2", "--steps=3"]).is_ok());
        let message = complaint(&["--warmup-steps=3", "--steps=3"])
            .unwrap_err()
            .to_string();
        assert!(message.contains("below the number of steps"), "{message}");
        let message = complaint(&["--warmup-steps=3", "--warmup-ratio=0.1"])
            .unwrap_err()
            .to_string();
        assert!(message.contains("not both"), "{message}");
        let message = train("", &[]).unwrap().validate().unwrap_err().to_string();
        assert!(message.contains("--model PATH"), "{message}");
    }
}
