//! `fuselora generate`.

use std::fs;
use std::io::{Write, stdout};
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::Context;
use fuselora_trainer::adapters::Adapters;
use fuselora_trainer::base_model::BaseModel;
use fuselora_trainer::cli::GenerateArgs;
use fuselora_trainer::machine::Machine;
use fuselora_trainer::mistake;
use fuselora_transformer::generate::{GenerateOptions, Request, generate, generate_all};
use serde_json::{Value, json};

pub fn run(arguments: &GenerateArgs) -> anyhow::Result<()> {
    let base = BaseModel::load(&arguments.model, &Machine::open(&arguments.machine)?)?;
    let adapters = Adapters::load(&base, &arguments.adapter)?;
    let stop_tokens = match &base.tokenizer {
        Some(tokenizer) if !arguments.ignore_eos => tokenizer.eos_token_ids().to_vec(),
        _ => Vec::new(),
    };
    let options = GenerateOptions {
        max_new_tokens: arguments.max_new_tokens,
        temperature: arguments.temperature as f32,
        top_p: arguments.top_p as f32,
        seed: arguments.seed,
        stop_tokens,
    };
    if let Some(file) = &arguments.prompts {
        return answer_all(arguments, &base, &adapters, &options, file);
    }
    let lora = adapters
        .of(arguments.adapter_name.as_deref())
        .context("--adapter-name")?;
    let prompt = prompt(arguments, &base)?;
    // Token ids in, token ids out, where there is no tokenizer.
    let mut text = base.tokenizer.as_ref().map(|tokenizer| tokenizer.stream());
    let mut written = Ok(());
    let generated = generate(&base.model, lora, &prompt, &options, |token| {
        if arguments.json {
            return ControlFlow::Continue(());
        }
        written = match &mut text {
            Some(stream) => stream
                .push(token)
                .map_err(Into::into)
                .and_then(|piece| say(&piece)),
            None => say(&format!("{token} ")),
        };
        if written.is_ok() {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    })?;
    written?;
    if !arguments.json {
        let rest = text
            .map(|stream| stream.finish())
            .transpose()?
            .unwrap_or_default();
        return say(&format!("{rest}\n"));
    }
    say(&format!("{}\n", as_json(&base, &prompt, &generated)?))
}

/// Prompt and continuation as `tokens`; the continuation as `text`, where there is a tokenizer.
fn as_json(base: &BaseModel, prompt: &[u32], generated: &[u32]) -> anyhow::Result<Value> {
    let tokens: Vec<u32> = prompt.iter().chain(generated).copied().collect();
    let mut answer = json!({ "tokens": tokens });
    if let Some(tokenizer) = &base.tokenizer {
        answer["text"] = tokenizer.decode(generated, true)?.into();
    }
    Ok(answer)
}

/// Answers every prompt of a file at once: a line of JSON each, in their order.
fn answer_all(
    arguments: &GenerateArgs,
    base: &BaseModel,
    adapters: &Adapters,
    options: &GenerateOptions,
    file: &Path,
) -> anyhow::Result<()> {
    let text =
        fs::read_to_string(file).with_context(|| format!("{} cannot be read", file.display()))?;
    let lines = text
        .lines()
        .zip(1..)
        .filter(|(line, _)| !line.trim().is_empty());
    let asked = lines
        .map(|(line, number)| {
            let at = || format!("{}, line {number}", file.display());
            let prompt: Prompt = serde_json::from_str(line)
                .map_err(|error| mistake!("{error}"))
                .with_context(at)?;
            let lora = adapters.of(prompt.adapter.as_deref()).with_context(at)?;
            let tokens = match (prompt.prompt, prompt.prompt_ids) {
                (Some(text), None) => encode(arguments, base, &text)?,
                (None, Some(ids)) => checked_ids(base, ids).with_context(at)?,
                _ => return Err(mistake!("it needs `prompt` or `prompt_ids`")).with_context(at),
            };
            Ok((prompt.adapter, tokens, lora))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let requests: Vec<Request> = asked
        .iter()
        .map(|(_, prompt, lora)| Request {
            prompt,
            lora: *lora,
        })
        .collect();
    let answers = generate_all(&base.model, &requests, options, |_, _| {
        ControlFlow::Continue(())
    })?;
    for ((adapter, prompt, _), answer) in asked.iter().zip(&answers) {
        let mut line = as_json(base, prompt, answer)?;
        if let Some(adapter) = adapter {
            line["adapter"] = adapter.clone().into();
        }
        say(&format!("{line}\n"))?;
    }
    Ok(())
}

/// A line of --prompts.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Prompt {
    prompt: Option<String>,
    prompt_ids: Option<Vec<u32>>,
    adapter: Option<String>,
}

/// The prompt's tokens: as given, or its text as a user's turn where the model has a chat template.
fn prompt(arguments: &GenerateArgs, base: &BaseModel) -> anyhow::Result<Vec<u32>> {
    let Some(text) = &arguments.prompt else {
        return checked_ids(base, arguments.prompt_ids.clone().unwrap_or_default())
            .context("--prompt-ids");
    };
    encode(arguments, base, text)
}

/// Token ids that the model has.
fn checked_ids(base: &BaseModel, ids: Vec<u32>) -> anyhow::Result<Vec<u32>> {
    let vocab_size = base.model.config().vocab_size;
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(id) => Err(mistake!(
            "token {id} is outside of the model's vocabulary of {vocab_size}"
        )),
        None => Ok(ids),
    }
}

/// A text's tokens, as a user's turn where the model has a chat template.
fn encode(arguments: &GenerateArgs, base: &BaseModel, text: &str) -> anyhow::Result<Vec<u32>> {
    let tokenizer = base.tokenizer()?;
    let template = tokenizer
        .chat_template()
        .filter(|_| !arguments.no_chat_template);
    let Some(template) = template else {
        return Ok(tokenizer.encode(text, true)?);
    };
    let system = arguments
        .system
        .iter()
        .map(|text| json!({"role": "system", "content": text}));
    let messages: Vec<_> = system
        .chain([json!({"role": "user", "content": text})])
        .collect();
    Ok(tokenizer.encode(&template.render(&json!(messages), None, true)?, false)?)
}

fn say(text: &str) -> anyhow::Result<()> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}
