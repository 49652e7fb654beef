//! Mistakes of the user, told apart from failures of the program.

/// Something that the user can put right: a wrong flag, a malformed row, a missing file.
///
/// Its message is one sentence that says what is wrong and what to do. Any error with a `Mistake` in its
/// chain ends the program with exit code 2, see [`exit_code`].
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Mistake(pub String);

/// Makes an [`anyhow::Error`] out of a [`Mistake`] with a formatted message.
#[macro_export]
macro_rules! mistake {
    ($($arguments:tt)*) => {
        ::anyhow::Error::new($crate::mistake::Mistake(format!($($arguments)*)))
    };
}

/// The exit code for an error: 2 where the user, or the user's machine (a full disk, an unreadable file),
/// is at fault, 1 for everything else.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    let outside = error.chain().any(|cause| {
        cause.is::<Mistake>()
            || cause.is::<std::io::Error>()
            || cause
                .downcast_ref::<fuselora_transformer::Error>()
                .is_some_and(is_about_input)
    });
    let outside = outside || tensor_error(error).is_some_and(is_about_machine);
    if outside { 2 } else { 1 }
}

fn is_about_input(error: &fuselora_transformer::Error) -> bool {
    use fuselora_transformer::Error;
    !matches!(error, Error::Tensor(_) | Error::NonFinite { .. })
}

/// The tensor error in a chain of causes.
fn tensor_error(error: &anyhow::Error) -> Option<&fuselora_tensor::Error> {
    error.chain().find_map(|cause| match cause.downcast_ref() {
        Some(fuselora_transformer::Error::Tensor(error)) => Some(error),
        _ => cause.downcast_ref(),
    })
}

fn is_about_machine(error: &fuselora_tensor::Error) -> bool {
    use fuselora_tensor::Error;
    matches!(
        error,
        Error::NoDriver
            | Error::NoDevice { .. }
            | Error::OldDriver { .. }
            | Error::OutOfMemory { .. }
    )
}

/// The error and its causes as one sentence, without the causes that a message quotes already.
pub fn sentence(error: &anyhow::Error) -> String {
    let mut sentence = String::new();
    for message in error.chain().map(ToString::to_string) {
        if sentence.is_empty() {
            sentence = message;
        } else if !sentence.ends_with(&message) {
            sentence += ": ";
            sentence += &message;
        }
    }
    if let Some(fuselora_tensor::Error::OutOfMemory { .. }) = tensor_error(error) {
        sentence +=
            "; lower --batch-size or --max-seq-length, or train with --gradient-checkpointing";
    }
    sentence
}

/// Whether the error is a reader that went away, as in `fuselora generate ... | head -1`.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn mistakes_are_found_under_their_context() {
        let error = Err::<(), _>(mistake!("rank is 0"))
            .context("run.toml")
            .unwrap_err();
        assert_eq!(exit_code(&error), 2);
        assert_eq!(sentence(&error), "run.toml: rank is 0");
        assert_eq!(exit_code(&anyhow::anyhow!("the shapes differ")), 1);
    }

    #[test]
    fn out_of_memory_says_what_to_lower() {
        let error = fuselora_tensor::Error::OutOfMemory {
            bytes: 3 << 20,
            device: "cuda:0".into(),
            held: Default::default(),
        };
        let error = anyhow::Error::new(fuselora_transformer::Error::from(error)).context("step 3");
        assert_eq!(exit_code(&error), 2);
        assert!(sentence(&error).contains("no room for 3 MiB more on cuda:0"));
        assert!(sentence(&error).ends_with("with --gradient-checkpointing"));
    }

    #[test]
    fn a_quoted_cause_is_said_once() {
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let message = full.to_string();
        let error = fuselora_transformer::Error::Io {
            path: "a".into(),
            source: full,
        };
        let error = anyhow::Error::new(error).context("saving");
        assert_eq!(exit_code(&error), 2);
        assert_eq!(sentence(&error), format!("saving: a: {message}"));
    }

    #[test]
    fn a_closed_pipe_is_recognised() {
        let closed = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        assert!(is_broken_pipe(
            &anyhow::Error::new(closed).context("writing")
        ));
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        assert!(!is_broken_pipe(&full.into()));
    }
}
