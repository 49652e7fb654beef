//! The checks that every operation makes before it touches data. Each error names the tensor.

use crate::{DType, Device, Error, Result, Shape, Tensor, Weight, tensor::Largest};

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

    pub(crate) fn check_device(&self, name: &str, expected: &Device) -> Result<()> {
        if !self.device().is_same(expected) {
            return Err(Error::Device {
                name: name.into(),
                expected: expected.to_string(),
                found: self.device().to_string(),
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

    /// The extents of activations, of one token at least; `expected` describes them in the error.
    pub(crate) fn tokens(&self, name: &str, expected: &str) -> Result<(usize, usize)> {
        match self.matrix(name, expected)? {
            (0, _) => Err(Error::Shape {
                name: name.into(),
                expected: format!("{expected} of at least one token"),
                found: self.shape().clone(),
            }),
            extents => Ok(extents),
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
        match self {
            Weight::Dense(tensor) => {
                tensor.check_float(name)?;
                tensor.matrix(name, "[out_features, in_features]")
            }
            Weight::Nf4(_) => Ok((self.out_features(), self.in_features())),
        }
    }

    pub(crate) fn check_device(&self, name: &str, expected: &Device) -> Result<()> {
        match self {
            Weight::Dense(tensor) => tensor.check_device(name, expected),
            Weight::Nf4(weight) => weight.packed().check_device(name, expected),
        }
    }
}

/// Checks that all of `tensors`, each with its name, are on `device`.
pub(crate) fn devices<const N: usize>(
    device: &Device,
    tensors: [(&str, &Tensor); N],
) -> Result<()> {
    tensors
        .into_iter()
        .try_for_each(|(name, tensor)| tensor.check_device(name, device))
}

/// Checks that each element of a U32 tensor is below `limit`.
pub(crate) fn indices(name: &str, tensor: &Tensor, limit: usize) -> Result<()> {
    #[cfg(feature = "cuda")]
    tensor.note_index_check(name, limit);
    largest(name, tensor.largest_index(name)?, limit)
}

/// Checks that the largest of a tensor's indices is below `limit`.
pub(crate) fn largest(name: &str, largest: Option<Largest>, limit: usize) -> Result<()> {
    match largest {
        Some(Largest { index, position }) if index as usize >= limit => Err(Error::Index {
            name: name.into(),
            position,
            index: index as usize,
            limit,
        }),
        _ => Ok(()),
    }
}
