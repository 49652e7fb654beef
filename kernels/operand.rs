//! What a launcher is given: the elements of a buffer on the device, borrowed and untyped, because
//! one launcher serves every storage type that its kernel was compiled for.

use crate::LaunchError;
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
use std::fmt;
use std::marker::PhantomData;

/// How one element is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// Token ids, positions, boundaries.
    U32,
    /// Packed codes, raw bytes.
    U8,
}

impl Element {
    /// Bytes that one element takes.
    pub const fn size_in_bytes(self) -> u64 {
        match self {
            Element::F32 | Element::U32 => 4,
            Element::F16 | Element::Bf16 => 2,
            Element::U8 => 1,
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Element::F32 => "f32",
            Element::F16 => "f16",
            Element::Bf16 => "bf16",
            Element::U32 => "u32",
            Element::U8 => "u8",
        })
    }
}

/// The Rust types that stand for an [`Element`].
pub trait Stored {
    /// The element type.
    const ELEMENT: Element;
}

impl Stored for f32 {
    const ELEMENT: Element = Element::F32;
}
impl Stored for half::f16 {
    const ELEMENT: Element = Element::F16;
}
impl Stored for half::bf16 {
    const ELEMENT: Element = Element::Bf16;
}
impl Stored for u32 {
    const ELEMENT: Element = Element::U32;
}
impl Stored for u8 {
    const ELEMENT: Element = Element::U8;
}

/// A buffer that a kernel reads.
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a> {
    address: u64,
    len: u64,
    element: Element,
    borrow: PhantomData<&'a ()>,
}

/// A buffer that a kernel writes.
#[derive(Debug)]
pub struct OperandMut<'a> {
    operand: Operand<'a>,
    borrow: PhantomData<&'a mut ()>,
}

impl<'a> Operand<'a> {
    /// `len` elements at `address`.
    ///
    /// # Safety
    /// They must lie in one allocation of the context that the kernel runs in, and stay allocated for
    /// `'a` and, after it, until the work that was launched on the same stream is done.
    pub const unsafe fn from_raw(address: u64, len: usize, element: Element) -> Operand<'a> {
        Operand {
            address,
            len: len as u64,
            element,
            borrow: PhantomData,
        }
    }

    /// The elements of a slice or view of cudarc's, for kernels on `stream`.
    pub fn of<T: Stored>(slice: &'a impl DevicePtr<T>, stream: &'a CudaStream) -> Operand<'a> {
        let (address, _recorded) = slice.device_ptr(stream);
        // SAFETY: the slice is borrowed for 'a, and cudarc frees it in the order of its stream.
        unsafe { Operand::from_raw(address, slice.len(), T::ELEMENT) }
    }

    /// The address of the first element: what a kernel's pointer parameter takes.
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// The number of elements.
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How the elements are stored.
    pub const fn element(&self) -> Element {
        self.element
    }

    /// Whether a kernel may access it `bytes` at a time from the first element on.
    pub const fn is_aligned(&self, bytes: u64) -> bool {
        self.address.is_multiple_of(bytes)
    }

    /// Checks the storage type, the number of elements, and that the first is where one can be.
    pub(crate) fn check(
        &self,
        tensor: &'static str,
        element: Element,
        len: u64,
    ) -> Result<(), LaunchError> {
        if self.element != element {
            return Err(LaunchError::Element {
                tensor,
                expected: element,
                found: self.element,
            });
        }
        if self.len != len {
            return Err(LaunchError::Length {
                tensor,
                expected: len,
                found: self.len,
            });
        }
        // A view may start anywhere in a tensor, but not within an element.
        match self.is_empty() {
            true => Ok(()),
            false => self.check_aligned(tensor, element.size_in_bytes()),
        }
    }

    /// Checks that it starts at a multiple of `bytes`, as accesses of that width need.
    pub(crate) fn check_aligned(
        &self,
        tensor: &'static str,
        bytes: u64,
    ) -> Result<(), LaunchError> {
        match self.is_aligned(bytes) {
            true => Ok(()),
            false => Err(LaunchError::Misaligned { tensor, bytes }),
        }
    }
}

impl<'a> OperandMut<'a> {
    /// `len` elements at `address`, to write.
    ///
    /// # Safety
    /// As [`Operand::from_raw`], and nothing else may read or write them for `'a`.
    pub const unsafe fn from_raw(address: u64, len: usize, element: Element) -> OperandMut<'a> {
        OperandMut {
            // SAFETY: the caller's promise covers this one.
            operand: unsafe { Operand::from_raw(address, len, element) },
            borrow: PhantomData,
        }
    }

    /// The elements of a slice or view of cudarc's, for kernels on `stream`.
    pub fn of<T: Stored>(
        slice: &'a mut impl DevicePtrMut<T>,
        stream: &'a CudaStream,
    ) -> OperandMut<'a> {
        let len = slice.len();
        let (address, _recorded) = slice.device_ptr_mut(stream);
        // SAFETY: the slice is borrowed mutably for 'a, and cudarc frees it in the order of its stream.
        unsafe { OperandMut::from_raw(address, len, T::ELEMENT) }
    }

    /// The same buffer for a shorter time, to give it away and keep it.
    pub fn reborrow(&mut self) -> OperandMut<'_> {
        OperandMut {
            operand: self.operand,
            borrow: PhantomData,
        }
    }
}

impl<'a> std::ops::Deref for OperandMut<'a> {
    type Target = Operand<'a>;

    fn deref(&self) -> &Operand<'a> {
        &self.operand
    }
}
