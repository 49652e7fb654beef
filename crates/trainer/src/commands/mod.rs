//! What each command does.

mod adapter;
mod convert;
mod eval;
mod generate;
mod inspect;
mod logits;
mod merge;
mod quantize;
mod train;

use fuselora_trainer::cli::Command;

/// Runs a command.
pub fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Train(config) => train::run(&config),
        Command::Eval(arguments) => eval::run(&arguments),
        Command::Generate(arguments) => generate::run(&arguments),
        Command::Merge(arguments) => merge::run(&arguments),
        Command::Convert(arguments) => convert::run(&arguments),
        Command::Adapter(arguments) => adapter::run(&arguments),
        Command::Quantize(arguments) => quantize::run(&arguments),
        Command::Logits(arguments) => logits::run(&arguments),
        Command::Inspect(arguments) => inspect::run(&arguments),
    }
}
