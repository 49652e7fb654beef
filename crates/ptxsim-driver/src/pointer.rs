//! Pointers that callers of the driver API hand over. The API's contract, which only the caller
//! can keep, is that a pointer is null or valid for what the function's documentation says; the
//! types here are the one place that relies on it.

use crate::error::CuResult;
use std::ffi::{CStr, c_char};

/// Where a function puts a result.
#[repr(transparent)]
pub struct Out<T>(*mut T);

impl<T> Out<T> {
    /// Stores a result; a null pointer is the caller's error.
    pub fn set(self, value: T) -> Result<(), CuResult> {
        if self.0.is_null() {
            return Err(CuResult::ERROR_INVALID_VALUE);
        }
        // SAFETY: not null, so valid for a write by the API's contract.
        unsafe { self.0.write_unaligned(value) };
        Ok(())
    }

    /// Stores a result that the caller may not want: null means so.
    pub fn set_if_wanted(self, value: T) {
        if !self.0.is_null() {
            // SAFETY: not null, so valid for a write by the API's contract.
            unsafe { self.0.write_unaligned(value) };
        }
    }

    /// The same place, for a result of another type.
    pub fn cast<U>(self) -> Out<U> {
        Out(self.0.cast())
    }

    /// Stores as many results as `values` has.
    pub fn fill(self, values: &[T]) -> Result<(), CuResult>
    where
        T: Copy,
    {
        if values.is_empty() {
            return Ok(());
        }
        if self.0.is_null() {
            return Err(CuResult::ERROR_INVALID_VALUE);
        }
        // SAFETY: not null, so valid for as many writes as the caller announced.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.0, values.len()) };
        Ok(())
    }
}

/// What a function reads and replaces.
#[repr(transparent)]
pub struct InOut<T>(*mut T);

impl<T: Copy> InOut<T> {
    /// The value.
    pub fn get(&self) -> Result<T, CuResult> {
        In(self.0.cast_const()).get()
    }

    /// Replaces the value.
    pub fn set(self, value: T) -> Result<(), CuResult> {
        Out(self.0).set(value)
    }
}

impl Out<u8> {
    /// The `bytes` bytes at the pointer, to write to.
    pub fn bytes(&mut self, bytes: usize) -> Result<&mut [u8], CuResult> {
        if bytes == 0 {
            return Ok(&mut []);
        }
        if self.0.is_null() {
            return Err(CuResult::ERROR_INVALID_VALUE);
        }
        // SAFETY: not null, so valid for as many bytes as the caller announced.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.0, bytes) })
    }

    /// Host memory at an address, as unified addressing passes it.
    pub fn at(address: u64) -> Out<u8> {
        Out(address as *mut u8)
    }
}

/// What a function reads.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct In<T>(*const T);

impl<T: Copy> In<T> {
    /// Whether there is nothing.
    pub fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// The value.
    pub fn get(&self) -> Result<T, CuResult> {
        if self.0.is_null() {
            return Err(CuResult::ERROR_INVALID_VALUE);
        }
        // SAFETY: not null, so valid for a read by the API's contract.
        Ok(unsafe { self.0.read_unaligned() })
    }

    /// `count` values.
    pub fn slice(&self, count: usize) -> Result<&[T], CuResult> {
        if count == 0 {
            return Ok(&[]);
        }
        if self.0.is_null() {
            return Err(CuResult::ERROR_INVALID_VALUE);
        }
        // SAFETY: not null, so valid for as many values as the caller announced.
        Ok(unsafe { std::slice::from_raw_parts(self.0, count) })
    }

    /// The pointer, `values` further on.
    pub fn offset(&self, values: usize) -> In<T> {
        In(self.0.wrapping_add(values))
    }

    /// The same place, read as another type.
    pub fn cast<U>(self) -> In<U> {
        In(self.0.cast())
    }

    /// Host memory at an address, as unified addressing passes it.
    pub fn at(address: u64) -> In<T> {
        In(address as *const T)
    }
}

impl In<c_char> {
    /// The C string.
    pub fn text(&self) -> Result<&CStr, CuResult> {
        if self.0.is_null() {
            return Err(CuResult::ERROR_INVALID_VALUE);
        }
        // SAFETY: not null, so a C string by the API's contract.
        Ok(unsafe { CStr::from_ptr(self.0) })
    }
}
