//! Memory as the device sees it.
//!
//! A device address is a number with three fields: a tag that no host pointer has, the id of its
//! allocation, and a biased offset. So every address says which allocation it was derived from,
//! even when it has left it: out of bounds and use after free are exact, not a matter of luck.
//!
//! The other state spaces are windows of the generic address space, see [`Window`].

mod device;

pub(crate) use device::{AddressError, DeviceMemory, Snapshot};

use std::fmt;

/// An address in device memory. It carries its allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevicePtr(pub u64);

/// How much memory there is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Not allocated.
    pub free: u64,
    /// All of the device's.
    pub total: u64,
}

/// A call about memory that cannot be done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// More than the device has left.
    #[error("out of device memory: {requested} bytes asked for, {free} of {total} are free")]
    OutOfMemory {
        /// Bytes asked for.
        requested: u64,
        /// Bytes free.
        free: u64,
        /// Bytes in all.
        total: u64,
    },
    /// The address is not one that this device gave out.
    #[error("{0:#x} is not a device address")]
    NotDevice(u64),
    /// The allocation was freed before.
    #[error("{address:#x} was freed: {}", .allocation.describe(*.address))]
    Freed {
        /// The address.
        address: u64,
        /// The allocation as it was.
        allocation: AllocationInfo,
    },
    /// The address is inside an allocation but must be its start.
    #[error("{address:#x} is not the start of an allocation: {}", .allocation.describe(*.address))]
    NotStart {
        /// The address.
        address: u64,
        /// The allocation.
        allocation: AllocationInfo,
    },
    /// The range leaves the allocation.
    #[error("{bytes} bytes at {address:#x} leave their allocation: {}", .allocation.describe(*.address))]
    OutOfBounds {
        /// The address.
        address: u64,
        /// Bytes asked for.
        bytes: u64,
        /// The allocation.
        allocation: AllocationInfo,
    },
    /// A fill of 16- or 32-bit values at an address that is not a multiple of their size.
    #[error("{address:#x} is not a multiple of {alignment}")]
    Misaligned {
        /// The address.
        address: u64,
        /// The alignment needed.
        alignment: u64,
    },
}

/// One allocation, as messages describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllocationInfo {
    /// Counts allocations from 1.
    pub id: u32,
    /// The first address.
    pub address: u64,
    /// Size in bytes.
    pub bytes: u64,
    /// The variable's name, for a module's globals and constants.
    pub name: Option<String>,
    /// Whether it has been freed.
    pub freed: bool,
}

impl AllocationInfo {
    /// Where `address` lies in relation to the allocation, in words.
    pub fn describe(&self, address: u64) -> String {
        let what = match &self.name {
            Some(name) => format!("`{name}`"),
            None => format!("allocation #{}", self.id),
        };
        let freed = if self.freed { "freed " } else { "" };
        let size = self.bytes;
        match address.checked_sub(self.address) {
            None => format!(
                "{} bytes before the {size} bytes of {freed}{what}",
                self.address - address
            ),
            Some(offset) if offset < size => {
                format!("byte {offset} of the {size} bytes of {freed}{what}")
            }
            Some(offset) => format!(
                "{} bytes past the end of the {size} bytes of {freed}{what}",
                offset - size
            ),
        }
    }
}

impl fmt::Display for DevicePtr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// The windows of the generic address space. Device addresses have the highest tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Window {
    /// Device memory; the address is used whole.
    Global,
    /// Shared memory of the block, or of a block of the cluster: the offset is a 32-bit address.
    Shared,
    /// The thread's local memory.
    Local,
    /// The kernel's parameters.
    Param,
    /// None of them.
    Host,
}

impl Window {
    /// First generic address of shared memory.
    pub const SHARED: u64 = 1 << 61;
    /// First generic address of local memory.
    pub const LOCAL: u64 = 1 << 60;
    /// First generic address of the kernel parameters.
    pub const PARAM: u64 = 1 << 59;

    /// The window that a generic address lies in.
    pub fn of(address: u64) -> Window {
        match address >> 32 {
            high if high >> 30 == 1 => Window::Global,
            0x2000_0000 => Window::Shared,
            0x1000_0000 => Window::Local,
            0x0800_0000 => Window::Param,
            _ => Window::Host,
        }
    }
}
