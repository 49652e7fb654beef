//! `fuselora generate`.

use std::io::{Write, stdout};
use std::ops::ControlFlow;

use fuselora_trainer::base_model::BaseModel;
use fuselora_trainer::cli::GenerateArgs;
use fuselora_trainer::machine::Machine;
use fuselora_trainer::mistake;
use fuselora_transformer::generate::{GenerateOptions, generate};
use fuselora_transformer::lora::Pass;
use serde_json::json;

pub fn run(arguments: &GenerateArgs) -> anyhow::Result<()> {
    let base = BaseModel::load(&arguments.model, &Machine::open(&arguments.machine)?)?;
    let lora = arguments
        .adapter
        .as_deref()
        .map(|folder| base.adapter(folder))
        .transpose()?;
    let prompt = prompt(arguments, &base)?;
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
    let pass = Pass {
        lora: lora.as_ref(),
        ..Pass::default()
    };
    // Token ids in, token ids out, where there is no tokenizer.
    let mut text = base.tokenizer.as_ref().map(|tokenizer| tokenizer.stream());
    let mut written = Ok(());
    let generated = generate(&base.model, &pass, &prompt, &options, |token| {
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
    let tokens: Vec<u32> = prompt.iter().chain(&generated).copied().collect();
    let mut answer = json!({ "tokens": tokens });
    if let Some(tokenizer) = &base.tokenizer {
        answer["text"] = tokenizer.decode(&generated, true)?.into();
    }
    say(&format!("{answer}\n"))
}

/// The prompt's tokens: as given, or its text as a user's turn where the model has a chat template.
fn prompt(arguments: &GenerateArgs, base: &BaseModel) -> anyhow::Result<Vec<u32>> {
    let Some(text) = &arguments.prompt else {
        let ids = arguments.prompt_ids.clone().unwrap_or_default();
        let vocab_size = base.model.config().vocab_size;
        return match ids.iter().find(|&&id| id as usize >= vocab_size) {
            Some(id) => Err(mistake!(
                "token {id} of --prompt-ids is outside of the model's vocabulary of {vocab_size}"
            )),
            None => Ok(ids),
        };
    };
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
