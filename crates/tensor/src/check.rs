//! The checks that every operation makes before it touches data. Each error names the tensor.

use crate::{DType, Error, Result, Shape, Tensor, Weight};

impl Tensor {
    pub(crate) fn check_shape(&self, name: &str, expected: &[usize]) -> Result<()> {
        if **self.shape() != *expected {
            return Err(Error::Shape {
                name: name.into(),
                expected: Shape::from(expected).to_string(),
                found: self.shape().clone(),
            });
        }
        Ok(())
    }

    pub(crate) fn check_dtype(&self, name: &str, expected: DType) -> Result<()> {
        if self.dtype() != expected {
            return Err(Error::DType {
                name: name.into(),
                expected: expected.to_string(),
                found: self.dtype(),
            });
        }
        Ok(())
    }

    pub(crate) fn check_float(&self, name: &str) -> Result<()> {
        if !self.dtype().is_float() {
            return Err(Error::DType {
                name: name.into(),
                expected: "f32, f16 or bf16".into(),
                found: self.dtype(),
            });
        }
        Ok(())
    }

    /// The extents of a matrix; `expected` describes them in the error, as in `[tokens, in_features]`.
    pub(crate) fn matrix(&self, name: &str, expected: &str) -> Result<(usize, usize)> {
        match **self.shape() {
            [rows, columns] => Ok((rows, columns)),
            _ => Err(Error::Shape {
                name: name.into(),
                expected: expected.into(),
                found: self.shape().clone(),
            }),
        }
    }

    /// The length of a vector; `expected` describes it in the error, as in `[tokens]`.
    pub(crate) fn vector(&self, name: &str, expected: &str) -> Result<usize> {
        match **self.shape() {
            [len] => Ok(len),
            _ => Err(Error::Shape {
                name: name.into(),
                expected: expected.into(),
                found: self.shape().clone(),
            }),
        }
    }
}

impl Weight {
    /// The extents of a frozen matrix of floats.
    pub(crate) fn matrix(&self, name: &str) -> Result<(usize, usize)> {
        let Weight::Dense(tensor) = self;
        tensor.check_float(name)?;
        tensor.matrix(name, "[out_features, in_features]")
    }
}

/// Checks that each of `indices` is below `limit`.
pub(crate) fn indices(name: &str, indices: &[u32], limit: usize) -> Result<()> {
    match indices.iter().position(|&index| index as usize >= limit) {
        None => Ok(()),
        Some(position) => Err(Error::Index {
            name: name.into(),
            position,
            index: indices[position] as usize,
            limit,
        }),
    }
}
