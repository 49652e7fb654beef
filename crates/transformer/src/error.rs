//! What can go wrong above the tensors.

use std::path::PathBuf;

/// A failure of reading, building or running a model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `config.json` asks for something that does not exist here or does not fit.
    #[error("config.json: {0}")]
    Config(String),
    /// A tensor of the checkpoint has another shape than the configuration wants.
    #[error("tensor `{name}` has shape {got}, and the model wants {expected}")]
    TensorShape {
        /// The tensor's name in the checkpoint.
        name: String,
        /// Its shape there.
        got: String,
        /// The shape that the configuration implies.
        expected: String,
    },
    /// Input that the model cannot take.
    #[error("{0}")]
    Input(String),
    /// A NaN or an infinity, found while retracing a step.
    #[error("the first operation with a NaN or infinite result is {operation}")]
    NonFinite {
        /// Module path and operation.
        operation: String,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] fuselora_tensor::Error),
    /// A file whose content is not what it must be.
    #[error("{path}: {message}", path = path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong, and what would be right.
        message: String,
    },
    /// A tensor that is stored wrongly, is missing, or cannot be read as asked.
    #[error("{path}: tensor `{tensor}`: {message}", path = path.display())]
    StoredTensor {
        /// The file or folder.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What is wrong, and what would be right.
        message: String,
    },
    /// An adapter's configuration that does not fit the model or is not supported.
    #[error("adapter: {0}")]
    Adapter(String),
}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn config(message: impl Into<String>) -> Error {
        Error::Config(message.into())
    }

    pub(crate) fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Error {
        Error::Io {
            path: path.into(),
            source,
        }
    }

    pub(crate) fn file(path: impl Into<PathBuf>, message: impl Into<String>) -> Error {
        Error::File {
            path: path.into(),
            message: message.into(),
        }
    }

    pub(crate) fn stored_tensor(
        path: impl Into<PathBuf>,
        tensor: impl Into<String>,
        message: impl Into<String>,
    ) -> Error {
        Error::StoredTensor {
            path: path.into(),
            tensor: tensor.into(),
            message: message.into(),
        }
    }

    pub(crate) fn adapter(message: impl Into<String>) -> Error {
        Error::Adapter(message.into())
    }
}
