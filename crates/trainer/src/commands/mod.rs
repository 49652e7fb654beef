//! What each command does.

mod convert;

use fuselora_trainer::{cli::Command, mistake};

/// Runs a command.
pub fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Convert(arguments) => convert::run(&arguments),
        _ => Err(mistake!(
            "this build of fuselora was made without that command"
        )),
    }
}
