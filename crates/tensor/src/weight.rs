use crate::{Device, Error, Nf4Weight, Result, Shape, Tensor, convert};
use std::ops::Range;

/// A frozen weight as it is stored, `[out_features, in_features]`.
#[derive(Debug)]
pub enum Weight {
    /// Every element in a float type: F32, F16 or BF16.
    Dense(Tensor),
    /// Four bits an element, in blocks.
    Nf4(Box<Nf4Weight>),
}

impl From<Nf4Weight> for Weight {
    fn from(weight: Nf4Weight) -> Weight {
        Weight::Nf4(Box::new(weight))
    }
}

impl Weight {
    /// The extents, `[out_features, in_features]`.
    pub fn shape(&self) -> &Shape {
        match self {
            Weight::Dense(tensor) => tensor.shape(),
            Weight::Nf4(weight) => weight.shape(),
        }
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
        match self {
            Weight::Dense(tensor) => tensor.size_in_bytes(),
            Weight::Nf4(weight) => weight.size_in_bytes(),
        }
    }

    /// The device that holds it.
    pub fn device(&self) -> &Device {
        match self {
            Weight::Dense(tensor) => tensor.device(),
            Weight::Nf4(weight) => weight.device(),
        }
    }

    /// The elements where each is stored by itself.
    pub fn dense(&self) -> Option<&Tensor> {
        match self {
            Weight::Dense(tensor) => Some(tensor),
            Weight::Nf4(_) => None,
        }
    }

    /// The same, to change.
    pub fn dense_mut(&mut self) -> Option<&mut Tensor> {
        match self {
            Weight::Dense(tensor) => Some(tensor),
            Weight::Nf4(_) => None,
        }
    }

    /// All elements, decoded, on the host.
    ///
    /// # Errors
    /// When the elements are not floats.
    pub fn to_f32_vec(&self) -> Result<Vec<f32>> {
        match self {
            Weight::Dense(tensor) => tensor.to_f32_vec(),
            Weight::Nf4(weight) if !weight.device().is_cpu() => {
                Weight::from(weight.to_device(&Device::cpu())?).to_f32_vec()
            }
            Weight::Nf4(weight) => {
                let count = weight.shape().iter().product();
                let mut values = vec![0.0; count];
                weight.decode(0..count, &mut values);
                Ok(values)
            }
        }
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
        match self {
            Weight::Dense(tensor) => tensor.as_f32().ok(),
            Weight::Nf4(_) => None,
        }
    }

    /// Decodes the elements in `range` (of the row-major order) into `out`. The caller has checked both, and that the
    /// weight is on the CPU.
    pub(crate) fn decode(&self, range: Range<usize>, out: &mut [f32]) {
        let tensor = match self {
            Weight::Dense(tensor) => tensor,
            Weight::Nf4(weight) => return weight.decode(range, out),
        };
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

    /// The elements as a tensor, for what has a kernel for dense weights alone.
    #[cfg(feature = "cuda")]
    pub(crate) fn expect_dense(&self, name: &str) -> Result<&Tensor> {
        self.dense().ok_or_else(|| {
            Error::Argument(format!(
                "{name}: this operation takes NF4 weights on the cpu only"
            ))
        })
    }
}
