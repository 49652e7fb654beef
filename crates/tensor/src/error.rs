use crate::{DType, Held, Shape, pool::size};

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
    #[error("out of memory: no room for {} more on {device}, where these are held: {held}", size(*.bytes as u64))]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// The device.
        device: String,
        /// What its memory is held for.
        held: Held,
    },
    /// A tensor is on another device than the operation, or the other tensors, need.
    #[error("{name}: expected on {expected}, found on {found}")]
    Device {
        /// The tensor, as the operation calls it.
        name: String,
        /// The device that would fit.
        expected: String,
        /// The device it is on.
        found: String,
    },
    /// There is no CUDA driver.
    #[error("no CUDA driver was found on this machine: install NVIDIA's driver, or use the CPU")]
    NoDriver,
    /// There is no CUDA device of this number.
    #[error("there is no device cuda:{ordinal}: this machine has {count}, counted from cuda:0")]
    NoDevice {
        /// The number asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The CUDA driver is older than the compiler of the kernels.
    #[error(
        "the NVIDIA driver supports CUDA {supports}, which is older than the kernels' PTX {ptx}: update the driver, or \
         build with the nvcc of that CUDA version (set NVCC)"
    )]
    OldDriver {
        /// The CUDA version that the driver supports.
        supports: String,
        /// The version of the kernels' PTX.
        ptx: String,
    },
    /// Work that was to be captured as a [`Graph`](crate::Graph) cannot be.
    #[error("the work cannot be captured as a CUDA graph: {0}")]
    NotCaptured(String),
    /// A kernel could not be launched, or the device failed; the message names the kernel.
    #[error("{0}")]
    Cuda(String),
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
