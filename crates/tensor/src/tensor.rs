use crate::{DType, Device, Error, Result, Shape, convert, pool::Buffer};
use bytes::Bytes;
use std::fmt;

/// A contiguous, row-major array on a [`Device`].
///
/// It is not `Clone`, because a copy of a large tensor should be seen where it is made: [`Tensor::try_clone`].
pub struct Tensor {
    shape: Shape,
    dtype: DType,
    device: Device,
    storage: Storage,
}

enum Storage {
    Owned(Buffer),
    /// Memory that others see too, such as a mapped file: aligned to the element type and read-only.
    Shared(Bytes),
}

impl Tensor {
    /// A tensor whose elements have unspecified values.
    ///
    /// # Errors
    /// When the shape is too large to address or the device has no room.
    pub fn empty(device: &Device, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        let shape = shape.into();
        let buffer = device.allocate(size_in_bytes(&shape, dtype)?)?;
        Ok(Tensor {
            shape,
            dtype,
            device: device.clone(),
            storage: Storage::Owned(buffer),
        })
    }

    /// A tensor of zeros.
    ///
    /// # Errors
    /// As [`Tensor::empty`].
    pub fn zeros(device: &Device, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        let mut tensor = Tensor::empty(device, shape, dtype)?;
        tensor.fill_zero()?;
        Ok(tensor)
    }

    /// An F32 tensor whose elements all are `value`.
    ///
    /// # Errors
    /// As [`Tensor::empty`].
    pub fn full_f32(device: &Device, shape: impl Into<Shape>, value: f32) -> Result<Tensor> {
        let mut tensor = Tensor::empty(device, shape, DType::F32)?;
        tensor.as_f32_mut()?.fill(value);
        Ok(tensor)
    }

    /// An F32 tensor with a copy of `values`.
    ///
    /// # Errors
    /// As [`Tensor::empty`], and when the shape has another number of elements.
    pub fn from_f32(device: &Device, shape: impl Into<Shape>, values: &[f32]) -> Result<Tensor> {
        Tensor::from_bytes(device, shape, DType::F32, bytemuck::cast_slice(values))
    }

    /// A U32 tensor with a copy of `values`.
    ///
    /// # Errors
    /// As [`Tensor::from_f32`].
    pub fn from_u32(device: &Device, shape: impl Into<Shape>, values: &[u32]) -> Result<Tensor> {
        Tensor::from_bytes(device, shape, DType::U32, bytemuck::cast_slice(values))
    }

    /// A tensor with a copy of the little-endian elements in `bytes`, which need no alignment.
    ///
    /// # Errors
    /// As [`Tensor::empty`], and when the number of bytes does not fit the shape.
    pub fn from_bytes(
        device: &Device,
        shape: impl Into<Shape>,
        dtype: DType,
        bytes: &[u8],
    ) -> Result<Tensor> {
        let shape = shape.into();
        check_length(&shape, dtype, bytes.len())?;
        let mut tensor = Tensor::empty(device, shape, dtype)?;
        tensor.bytes_mut("tensor")?.copy_from_slice(bytes);
        Ok(tensor)
    }

    /// A read-only tensor over `bytes`, little endian, such as a range of a memory-mapped file
    /// (`Bytes::from_owner`). On the CPU nothing is copied when the bytes are aligned to the data type.
    ///
    /// # Errors
    /// As [`Tensor::from_bytes`].
    pub fn from_shared(
        device: &Device,
        shape: impl Into<Shape>,
        dtype: DType,
        bytes: Bytes,
    ) -> Result<Tensor> {
        let shape = shape.into();
        check_length(&shape, dtype, bytes.len())?;
        if bytes.as_ptr().align_offset(dtype.size_in_bytes()) != 0 {
            return Tensor::from_bytes(device, shape, dtype, &bytes);
        }
        Ok(Tensor {
            shape,
            dtype,
            device: device.clone(),
            storage: Storage::Shared(bytes),
        })
    }

    /// The extents, outermost first.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The device that holds the elements.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The number of elements.
    pub fn element_count(&self) -> usize {
        self.bytes().len() / self.dtype.size_in_bytes()
    }

    /// Bytes that the elements take.
    pub fn size_in_bytes(&self) -> usize {
        self.bytes().len()
    }

    /// The elements as f32, on the host, from any float type.
    ///
    /// # Errors
    /// When the elements are not floats.
    pub fn to_f32_vec(&self) -> Result<Vec<f32>> {
        self.check_float("tensor")?;
        let mut values = vec![0.0; self.element_count()];
        convert::decode(self.dtype, self.bytes(), &mut values);
        Ok(values)
    }

    /// The elements of a U32 tensor, on the host.
    ///
    /// # Errors
    /// When the data type is not U32.
    pub fn to_u32_vec(&self) -> Result<Vec<u32>> {
        Ok(self.as_u32()?.to_vec())
    }

    /// The elements' little-endian bytes, on the host.
    ///
    /// # Errors
    /// When the device cannot be read.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        Ok(self.bytes().to_vec())
    }

    /// A copy with another float type, rounded to nearest even.
    ///
    /// # Errors
    /// When either type is not a float, and as [`Tensor::empty`].
    pub fn cast(&self, dtype: DType) -> Result<Tensor> {
        if dtype == self.dtype {
            return self.try_clone();
        }
        self.check_float("tensor")?;
        let mut out = Tensor::empty(&self.device, &self.shape, dtype)?;
        out.check_float("cast target")?;
        match (self.dtype, dtype) {
            (DType::F32, _) => {
                convert::encode(self.as_f32()?, dtype, out.bytes_mut("cast target")?)
            }
            (_, DType::F32) => convert::decode(self.dtype, self.bytes(), out.as_f32_mut()?),
            _ => convert::encode(&self.to_f32_vec()?, dtype, out.bytes_mut("cast target")?),
        }
        Ok(out)
    }

    /// A copy in memory of its own.
    ///
    /// # Errors
    /// As [`Tensor::empty`].
    pub fn try_clone(&self) -> Result<Tensor> {
        self.to_device(&self.device)
    }

    /// A copy on `device`.
    ///
    /// # Errors
    /// As [`Tensor::empty`].
    pub fn to_device(&self, device: &Device) -> Result<Tensor> {
        Tensor::from_bytes(device, &self.shape, self.dtype, self.bytes())
    }

    /// The same elements in another shape.
    ///
    /// # Errors
    /// When the number of elements differs.
    pub fn reshape(self, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        if shape.element_count() != Some(self.element_count()) {
            return Err(Error::Shape {
                name: "reshape".into(),
                expected: format!(
                    "of {} elements, as {} has",
                    self.element_count(),
                    self.shape
                ),
                found: shape,
            });
        }
        Ok(Tensor { shape, ..self })
    }

    /// Sets every element to zero.
    ///
    /// # Errors
    /// When the tensor is a read-only view of shared memory.
    pub fn fill_zero(&mut self) -> Result<()> {
        self.bytes_mut("tensor")?.fill(0);
        Ok(())
    }

    /// Copies the elements of `source`, which has the same shape and data type.
    ///
    /// # Errors
    /// When shape or data type differ, or this tensor is a read-only view of shared memory.
    pub fn copy_from(&mut self, source: &Tensor) -> Result<()> {
        source.check_shape("source", &self.shape)?;
        source.check_dtype("source", self.dtype)?;
        self.bytes_mut("target")?.copy_from_slice(source.bytes());
        Ok(())
    }

    /// The elements of an F32 tensor on the CPU.
    ///
    /// # Errors
    /// When the data type or the device is another.
    pub fn as_f32(&self) -> Result<&[f32]> {
        self.f32("tensor")
    }

    /// The elements of an F32 tensor on the CPU, to change.
    ///
    /// # Errors
    /// When the data type or the device is another, or the tensor is a read-only view of shared memory.
    pub fn as_f32_mut(&mut self) -> Result<&mut [f32]> {
        self.f32_mut("tensor")
    }

    /// The elements of a U32 tensor on the CPU.
    ///
    /// # Errors
    /// When the data type or the device is another.
    pub fn as_u32(&self) -> Result<&[u32]> {
        self.u32("tensor")
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.storage {
            Storage::Owned(buffer) => buffer.bytes(),
            Storage::Shared(bytes) => bytes,
        }
    }

    pub(crate) fn bytes_mut(&mut self, name: &str) -> Result<&mut [u8]> {
        match &mut self.storage {
            Storage::Owned(buffer) => Ok(buffer.bytes_mut()),
            Storage::Shared(_) => Err(Error::ReadOnly { name: name.into() }),
        }
    }

    pub(crate) fn f32(&self, name: &str) -> Result<&[f32]> {
        self.check_dtype(name, DType::F32)?;
        Ok(bytemuck::cast_slice(self.bytes()))
    }

    pub(crate) fn f32_mut(&mut self, name: &str) -> Result<&mut [f32]> {
        self.check_dtype(name, DType::F32)?;
        Ok(bytemuck::cast_slice_mut(self.bytes_mut(name)?))
    }

    pub(crate) fn u32(&self, name: &str) -> Result<&[u32]> {
        self.check_dtype(name, DType::U32)?;
        Ok(bytemuck::cast_slice(self.bytes()))
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Tensor({} {}, {:?})",
            self.dtype, self.shape, self.device
        )
    }
}

fn size_in_bytes(shape: &Shape, dtype: DType) -> Result<usize> {
    shape
        .element_count()
        .and_then(|count| count.checked_mul(dtype.size_in_bytes()))
        .filter(|&bytes| isize::try_from(bytes).is_ok())
        .ok_or_else(|| Error::TooLarge(shape.clone()))
}

fn check_length(shape: &Shape, dtype: DType, found: usize) -> Result<()> {
    let expected = size_in_bytes(shape, dtype)?;
    if expected != found {
        return Err(Error::Length {
            shape: shape.clone(),
            dtype,
            expected,
            found,
        });
    }
    Ok(())
}
