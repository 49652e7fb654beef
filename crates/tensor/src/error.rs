use crate::{DType, Shape};

/// What a tensor operation returns.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a tensor operation refused a call.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// A tensor has another shape than the operation needs.
    #[error("{name}: expected shape {expected}, found {found}")]
    Shape {
        /// The tensor, as the operation calls it.
        name: String,
        /// The shape that would fit.
        expected: String,
        /// The shape it has.
        found: Shape,
    },
    /// A tensor has another data type than the operation needs.
    #[error("{name}: expected data type {expected}, found {found}")]
    DType {
        /// The tensor, as the operation calls it.
        name: String,
        /// The data types that would fit.
        expected: String,
        /// The data type it has.
        found: DType,
    },
    /// An index points outside the tensor that it indexes.
    #[error("{name}: the index {index} at position {position} is not below {limit}")]
    Index {
        /// The tensor of indices, as the operation calls it.
        name: String,
        /// Where in it the index stands.
        position: usize,
        /// The index.
        index: usize,
        /// The number of rows that may be indexed.
        limit: usize,
    },
    /// The data given has another length than the shape and data type need.
    #[error("{shape} of {dtype} takes {expected} bytes, but {found} were given")]
    Length {
        /// The shape asked for.
        shape: Shape,
        /// The data type asked for.
        dtype: DType,
        /// Bytes needed.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// A shape has more bytes than this machine can address.
    #[error("a tensor of shape {0} is too large to address")]
    TooLarge(Shape),
    /// The device has no memory left.
    #[error("out of memory: no room for {bytes} bytes more on the {device}")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// The device.
        device: &'static str,
    },
    /// A tensor that is a read-only view of shared memory was to be changed.
    #[error("{name}: a tensor over shared memory is read-only; clone it first")]
    ReadOnly {
        /// The tensor, as the operation calls it.
        name: String,
    },
    /// An argument that is not a tensor has a value that makes no sense.
    #[error("{0}")]
    Argument(String),
}
