//! Ctrl-C: the first press asks the trainer to finish its step and save, the second ends the program.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use anyhow::Context;

/// The exit code of a program that SIGINT ended (128 + 2), by the convention of shells.
const INTERRUPTED: i32 = 130;

/// Whether the user has asked the program to stop.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes over Ctrl-C and the termination signal for the whole process.
    ///
    /// # Errors
    /// Where the system refuses the handler, or one is installed already.
    pub fn install() -> anyhow::Result<Interrupt> {
        let interrupt = Interrupt::default();
        let handler = interrupt.clone();
        ctrlc::set_handler(move || {
            if handler.request() {
                std::process::exit(INTERRUPTED);
            }
            eprintln!("\nFinishing this step, then saving. Press Ctrl-C again to stop at once.");
        })
        .context("Ctrl-C could not be taken over")?;
        Ok(interrupt)
    }

    /// Asks for a stop; true where one had been asked for already.
    pub fn request(&self) -> bool {
        self.0.swap(true, Ordering::SeqCst)
    }

    /// Whether a stop was asked for.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_second_request_finds_an_earlier_one() {
        let interrupt = Interrupt::default();
        let handler = interrupt.clone();
        assert!(!interrupt.requested());
        assert!(!handler.request());
        assert!(interrupt.requested());
        assert!(handler.request());
    }
}
