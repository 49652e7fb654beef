//! The program `fuselora`.

mod commands;

use std::{
    panic::{self, PanicHookInfo},
    process::ExitCode,
};

use fuselora_trainer::{cli, mistake};

fn main() -> ExitCode {
    panic::set_hook(Box::new(say_panic));
    // The hook has said what there is to say.
    panic::catch_unwind(run).map_or(ExitCode::FAILURE, |outcome| match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => end(&error),
    })
}

fn run() -> anyhow::Result<()> {
    let cli = cli::parse(std::env::args_os().collect())?;
    commands::run(cli.command)
}

/// Says what went wrong, in one sentence on standard error, and gives the exit code.
fn end(error: &anyhow::Error) -> ExitCode {
    if let Some(usage) = error.downcast_ref::<clap::Error>() {
        // A closed pipe is no reason to fail after `--help`.
        let _ = usage.print();
        return ExitCode::from(usage.exit_code() as u8);
    }
    if mistake::is_broken_pipe(error) {
        return ExitCode::SUCCESS;
    }
    eprintln!("error: {}", mistake::sentence(error));
    ExitCode::from(mistake::exit_code(error))
}

fn say_panic(panic: &PanicHookInfo) {
    let place = panic
        .location()
        .map(|place| format!(" ({}:{})", place.file(), place.line()))
        .unwrap_or_default();
    let payload = panic.payload();
    let text = payload.downcast_ref::<&str>().copied();
    let reason = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    let reason = reason.unwrap_or("unknown");
    eprintln!(
        "error: a defect in fuselora{place}: {reason}; please report it with the command that you ran"
    );
}
