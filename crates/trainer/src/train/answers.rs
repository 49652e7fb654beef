//! Answers to held-out prompts, before and after training.

use std::ops::ControlFlow;

use fuselora_transformer::generate::{GenerateOptions, generate};
use fuselora_transformer::lora::Lora;

use crate::base_model::BaseModel;
use crate::data::Row;
use crate::records::Answer;

/// Longest answer.
const MAX_NEW_TOKENS: usize = 64;

/// The first `count` held-out rows that are prompts with a completion, answered before training.
///
/// # Errors
/// Tokens that cannot be decoded, or no room on the device.
pub fn before(
    base: &BaseModel,
    lora: &Lora,
    rows: &[Row],
    count: usize,
) -> anyhow::Result<Vec<Answer>> {
    let Some(tokenizer) = &base.tokenizer else {
        return Ok(Vec::new());
    };
    // A row that is a target from its second token on has no prompt to answer.
    let prompts = rows.iter().filter(|row| row.prompt().len() > 1).take(count);
    prompts
        .map(|row| {
            let reference: Vec<u32> = row.targets().iter().flatten().copied().collect();
            Ok(Answer {
                prompt: tokenizer.decode(row.prompt(), true)?,
                reference: tokenizer.decode(&reference, true)?.trim().to_owned(),
                before: answer(base, lora, row.prompt())?,
                after: String::new(),
            })
        })
        .collect()
}

/// Answers the same prompts again.
///
/// # Errors
/// As [`before`].
pub fn after(
    base: &BaseModel,
    lora: &Lora,
    rows: &[Row],
    answers: &mut [Answer],
) -> anyhow::Result<()> {
    for (row, known) in rows
        .iter()
        .filter(|row| row.prompt().len() > 1)
        .zip(answers)
    {
        known.after = answer(base, lora, row.prompt())?;
    }
    Ok(())
}

fn answer(base: &BaseModel, lora: &Lora, prompt: &[u32]) -> anyhow::Result<String> {
    let tokenizer = base.tokenizer()?;
    let options = GenerateOptions {
        max_new_tokens: MAX_NEW_TOKENS,
        temperature: 0.0,
        top_p: 1.0,
        seed: 0,
        stop_tokens: tokenizer.eos_token_ids().to_vec(),
    };
    let tokens = generate(&base.model, Some(lora), prompt, &options, |_| {
        ControlFlow::Continue(())
    })?;
    Ok(tokenizer.decode(&tokens, true)?.trim().to_owned())
}
