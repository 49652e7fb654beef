//! The driver's result codes, and how the simulator's errors map to them.

use ptxsim::{Fault, FaultKind, MemoryError};
use std::ffi::CStr;

/// A `CUresult` other than success, or success as what an API function returns.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CuResult(pub u32);

macro_rules! codes {
    ($($name:ident = $code:literal, $text:literal;)*) => {
        impl CuResult {
            $(pub const $name: CuResult = CuResult($code);)*

            /// The name and the description of a code that this driver returns.
            pub fn describe(self) -> Option<(&'static CStr, &'static CStr)> {
                $(if self == CuResult::$name {
                    let name = concat!("CUDA_", stringify!($name), "\0");
                    let text = concat!($text, "\0");
                    let c = |text: &'static str| CStr::from_bytes_with_nul(text.as_bytes()).ok();
                    return c(name).zip(c(text));
                })*
                None
            }
        }
    };
}

codes! {
    SUCCESS = 0, "no error";
    ERROR_INVALID_VALUE = 1, "invalid argument";
    ERROR_OUT_OF_MEMORY = 2, "out of memory";
    ERROR_NOT_INITIALIZED = 3, "initialization error";
    ERROR_INVALID_DEVICE = 101, "invalid device ordinal";
    ERROR_INVALID_CONTEXT = 201, "invalid device context";
    ERROR_NO_BINARY_FOR_GPU = 209, "no kernel image is available for execution on the device";
    ERROR_INVALID_PTX = 218, "a PTX JIT compilation failed";
    ERROR_UNSUPPORTED_PTX_VERSION = 222, "the provided PTX was compiled with an unsupported toolchain.";
    ERROR_FILE_NOT_FOUND = 301, "file not found";
    ERROR_INVALID_HANDLE = 400, "invalid resource handle";
    ERROR_ILLEGAL_STATE = 401, "the operation cannot be performed in the present state";
    ERROR_NOT_FOUND = 500, "named symbol not found";
    ERROR_ILLEGAL_ADDRESS = 700, "an illegal memory access was encountered";
    ERROR_LAUNCH_OUT_OF_RESOURCES = 701, "too many resources requested for launch";
    ERROR_LAUNCH_TIMEOUT = 702, "the launch timed out and was terminated";
    ERROR_CONTEXT_IS_DESTROYED = 709, "context is destroyed";
    ERROR_ASSERT = 710, "device-side assert triggered";
    ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712, "part or all of the requested memory range is already mapped";
    ERROR_HOST_MEMORY_NOT_REGISTERED = 713, "pointer does not correspond to a registered memory region";
    ERROR_MISALIGNED_ADDRESS = 716, "misaligned address";
    ERROR_LAUNCH_FAILED = 719, "unspecified launch failure";
    ERROR_NOT_SUPPORTED = 801, "operation not supported";
    ERROR_STREAM_CAPTURE_UNSUPPORTED = 900, "operation not permitted when stream is capturing";
    ERROR_STREAM_CAPTURE_INVALIDATED = 901, "operation failed due to a previous error during capture";
    ERROR_STREAM_CAPTURE_MERGE = 902, "operation would result in a merge of separate capture sequences";
    ERROR_STREAM_CAPTURE_UNMATCHED = 903, "capture was not ended in the same stream as it began";
    ERROR_STREAM_CAPTURE_UNJOINED = 904, "capturing stream has unjoined work";
    ERROR_STREAM_CAPTURE_ISOLATION = 905, "dependency created on uncaptured work in another stream";
    ERROR_STREAM_CAPTURE_IMPLICIT = 906, "operation would make the legacy stream depend on a capturing blocking stream";
    ERROR_CAPTURED_EVENT = 907, "operation not permitted on an event last recorded in a capturing stream";
    ERROR_STREAM_CAPTURE_WRONG_THREAD = 908, "attempt to terminate a thread-local capture sequence from another thread";
    ERROR_UNKNOWN = 999, "unknown error";
}

impl From<MemoryError> for CuResult {
    fn from(error: MemoryError) -> CuResult {
        match error {
            MemoryError::OutOfMemory { .. } => CuResult::ERROR_OUT_OF_MEMORY,
            _ => CuResult::ERROR_INVALID_VALUE,
        }
    }
}

impl CuResult {
    /// The code of a fault, and whether it ends the context: a kernel that ran into one leaves
    /// memory in an unknown state, a launch that was refused does not.
    pub fn of_fault(fault: &Fault) -> (CuResult, bool) {
        match *fault.kind {
            FaultKind::InvalidLaunch(_) => (CuResult::ERROR_INVALID_VALUE, false),
            FaultKind::OutOfBounds { .. }
            | FaultKind::UseAfterFree { .. }
            | FaultKind::HostPointer { .. } => (CuResult::ERROR_ILLEGAL_ADDRESS, true),
            FaultKind::Misaligned { .. } => (CuResult::ERROR_MISALIGNED_ADDRESS, true),
            FaultKind::Endless { .. } => (CuResult::ERROR_LAUNCH_TIMEOUT, true),
            FaultKind::Assert { .. } => (CuResult::ERROR_ASSERT, true),
            _ => (CuResult::ERROR_LAUNCH_FAILED, true),
        }
    }
}
