use crate::{Device, Error, Result, Shape, Tensor, convert};
use std::ops::Range;

/// A frozen weight as it is stored, `[out_features, in_features]`.
#[derive(Debug)]
pub enum Weight {
    /// Every element in a float type: F32, F16 or BF16.
    Dense(Tensor),
}

impl Weight {
    /// The extents, `[out_features, in_features]`.
    pub fn shape(&self) -> &Shape {
        let Weight::Dense(tensor) = self;
        tensor.shape()
    }

    /// The number of rows.
    pub fn out_features(&self) -> usize {
        self.shape().first().copied().unwrap_or(0)
    }

    /// The number of columns.
    pub fn in_features(&self) -> usize {
        self.shape().get(1).copied().unwrap_or(0)
    }

    /// Bytes that the storage takes.
    pub fn size_in_bytes(&self) -> usize {
        let Weight::Dense(tensor) = self;
        tensor.size_in_bytes()
    }

    /// The elements where each is stored by itself.
    pub fn dense(&self) -> Option<&Tensor> {
        let Weight::Dense(tensor) = self;
        Some(tensor)
    }

    /// The same, to change.
    pub fn dense_mut(&mut self) -> Option<&mut Tensor> {
        let Weight::Dense(tensor) = self;
        Some(tensor)
    }

    /// All elements, decoded, on the host.
    ///
    /// # Errors
    /// When the elements are not floats.
    pub fn to_f32_vec(&self) -> Result<Vec<f32>> {
        let Weight::Dense(tensor) = self;
        tensor.to_f32_vec()
    }

    /// Decodes the rows in `range` into `out`, `[range.len(), in_features]`.
    ///
    /// # Errors
    /// When the range or the length of `out` do not fit, or the elements are not floats.
    pub fn rows_f32(&self, range: Range<usize>, out: &mut [f32]) -> Result<()> {
        let (rows, columns) = self.matrix("weight")?;
        if range.start > range.end || range.end > rows || out.len() != range.len() * columns {
            return Err(Error::Argument(format!(
                "weight: rows {range:?} of {} do not fit a buffer of {} values",
                self.shape(),
                out.len()
            )));
        }
        self.check_device("weight", &Device::cpu())?;
        self.decode(range.start * columns..range.end * columns, out);
        Ok(())
    }

    /// The elements where they are stored as f32, and nothing where they need decoding.
    pub(crate) fn as_f32(&self) -> Option<&[f32]> {
        let Weight::Dense(tensor) = self;
        tensor.as_f32().ok()
    }

    /// Decodes the elements in `range` (of the row-major order) into `out`. The caller has checked both, and that the
    /// weight is on the CPU.
    pub(crate) fn decode(&self, range: Range<usize>, out: &mut [f32]) {
        let Weight::Dense(tensor) = self;
        let Ok(bytes) = tensor.bytes("weight") else {
            unreachable!("callers decode weights on the CPU only")
        };
        let size = tensor.dtype().size_in_bytes();
        convert::decode(
            tensor.dtype(),
            &bytes[range.start * size..range.end * size],
            out,
        );
    }
}
