//! `fuselora train`.

use std::io::{Write, stdout};

use fuselora_trainer::cli::TrainConfig;
use fuselora_trainer::interrupt::Interrupt;
use fuselora_trainer::train;

pub fn run(config: &TrainConfig) -> anyhow::Result<()> {
    let interrupt = Interrupt::install()?;
    let outcome = train::run(config, &interrupt)?;
    let output = config.output()?.display();
    let mut out = stdout().lock();
    if outcome.interrupted {
        writeln!(
            out,
            "stopped after step {}, which is saved; continue with the same command and --resume",
            outcome.step
        )?;
        return Ok(());
    }
    for answer in &outcome.answers {
        writeln!(out, "\nprompt     {}", indented(&answer.prompt))?;
        writeln!(out, "before     {}", indented(&answer.before))?;
        writeln!(out, "after      {}", indented(&answer.after))?;
        if !answer.reference.is_empty() {
            writeln!(out, "reference  {}", indented(&answer.reference))?;
        }
    }
    writeln!(out)?;
    if let Some((before, after)) = outcome.eval_loss {
        writeln!(out, "held-out loss: {before:.4} before, {after:.4} after")?;
    }
    writeln!(out, "adapter: {output}")?;
    for file in &outcome.files {
        writeln!(out, "{}", file.display())?;
    }
    Ok(())
}

/// A text whose further lines stand under its first.
fn indented(text: &str) -> String {
    text.trim().replace('\n', "\n           ")
}
