#[cfg(feature = "cuda")]
use crate::cuda;
use crate::{
    DType, Device, Error, Purpose, Result, Shape, convert,
    device::Backend,
    pool::{Buffer, Heap},
};
use bytes::Bytes;
use std::fmt;
use std::ops::Range;

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
    Owned(Buffer<Heap>),
    /// Memory that others see too, such as a mapped file: aligned to the element type and read-only.
    Shared(Bytes),
    #[cfg(feature = "cuda")]
    Cuda {
        buffer: cuda::Buffer,
        /// Of indices that were copied from the host: so they are checked before a kernel reads them, and without
        /// asking the device.
        largest: cuda::LargestIndex,
    },
}

/// The largest of a tensor of indices.
#[derive(Clone, Copy)]
pub(crate) struct Largest {
    pub index: u32,
    pub position: usize,
}

impl Largest {
    pub fn of(indices: &[u32]) -> Option<Largest> {
        let mut indexed = indices.iter().enumerate();
        let (mut position, mut index) = indexed.next()?;
        for (at, candidate) in indexed {
            if candidate > index {
                (position, index) = (at, candidate);
            }
        }
        Some(Largest {
            index: *index,
            position,
        })
    }
}

impl Tensor {
    /// A tensor whose elements have unspecified values.
    ///
    /// # Errors
    /// When the shape is too large to address or the device has no room.
    pub fn empty(device: &Device, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        Tensor::new(device, shape.into(), dtype, None)
    }

    /// A tensor of unspecified values that an operation needs while it runs.
    #[cfg(feature = "cuda")]
    pub(crate) fn workspace(
        device: &Device,
        shape: impl Into<Shape>,
        dtype: DType,
    ) -> Result<Tensor> {
        Tensor::new(device, shape.into(), dtype, Some(Purpose::Workspace))
    }

    fn new(
        device: &Device,
        shape: Shape,
        dtype: DType,
        purpose: Option<Purpose>,
    ) -> Result<Tensor> {
        let bytes = size_in_bytes(&shape, dtype)?;
        let storage = match device.backend() {
            Backend::Cpu(pool) => Storage::Owned(pool.take(bytes, purpose)?),
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => Storage::Cuda {
                buffer: cuda.pool().take(bytes, purpose)?,
                largest: cuda::LargestIndex::default(),
            },
        };
        Ok(Tensor {
            shape,
            dtype,
            device: device.clone(),
            storage,
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
        let shape = shape.into();
        let count = size_in_bytes(&shape, DType::F32)? / size_of::<f32>();
        Tensor::from_f32(device, shape, &vec![value; count])
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
        tensor.write(bytes)?;
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
        if !device.is_cpu() || bytes.as_ptr().align_offset(dtype.size_in_bytes()) != 0 {
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
        self.size_in_bytes() / self.dtype.size_in_bytes()
    }

    /// Bytes that the elements take.
    pub fn size_in_bytes(&self) -> usize {
        match &self.storage {
            Storage::Owned(buffer) => buffer.len(),
            Storage::Shared(bytes) => bytes.len(),
            #[cfg(feature = "cuda")]
            Storage::Cuda { buffer, .. } => buffer.len(),
        }
    }

    /// The elements as f32, on the host, from any float type.
    ///
    /// # Errors
    /// When the elements are not floats, or the device cannot be read.
    pub fn to_f32_vec(&self) -> Result<Vec<f32>> {
        self.check_float("tensor")?;
        if !self.device.is_cpu() {
            return self.to_device(&Device::cpu())?.to_f32_vec();
        }
        let mut values = vec![0.0; self.element_count()];
        convert::decode(self.dtype, self.bytes("tensor")?, &mut values);
        Ok(values)
    }

    /// The elements of a U32 tensor, on the host.
    ///
    /// # Errors
    /// When the data type is not U32, or the device cannot be read.
    pub fn to_u32_vec(&self) -> Result<Vec<u32>> {
        self.check_dtype("tensor", DType::U32)?;
        Ok(bytemuck::pod_collect_to_vec(&self.to_bytes()?))
    }

    /// The elements' little-endian bytes, on the host.
    ///
    /// # Errors
    /// When the device cannot be read.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.size_in_bytes()];
        self.read(&mut bytes)?;
        Ok(bytes)
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
        #[cfg(feature = "cuda")]
        if !self.device.is_cpu() {
            self.device.launch(|kernels| {
                fuselora_kernels::elementwise::cast(kernels, self.operand(), out.operand_mut())
            })?;
            return Ok(out);
        }
        let bytes = self.bytes("tensor")?;
        match (self.dtype, dtype) {
            (DType::F32, _) => {
                convert::encode(self.as_f32()?, dtype, out.bytes_mut("cast target")?)
            }
            (_, DType::F32) => convert::decode(self.dtype, bytes, out.as_f32_mut()?),
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
        let mut copy = Tensor::empty(device, &self.shape, self.dtype)?;
        copy.copy_from(self)?;
        Ok(copy)
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
        #[cfg(feature = "cuda")]
        if let (Storage::Cuda { buffer, .. }, Backend::Cuda(cuda)) =
            (&mut self.storage, self.device.backend())
        {
            return cuda.fill_zero(buffer);
        }
        self.bytes_mut("tensor")?.fill(0);
        Ok(())
    }

    /// Copies the elements of `source`, which has the same shape and data type and may be on another device.
    ///
    /// # Errors
    /// When shape or data type differ, or this tensor is a read-only view of shared memory.
    pub fn copy_from(&mut self, source: &Tensor) -> Result<()> {
        source.check_shape("source", &self.shape)?;
        source.check_dtype("source", self.dtype)?;
        match (self.device.is_cpu(), source.device.is_cpu()) {
            (_, true) => self.write(source.bytes("source")?),
            (true, false) => source.read(self.bytes_mut("target")?),
            (false, false) if self.device.is_same(&source.device) => {
                self.copy_bytes(0, source, 0..source.size_in_bytes())
            }
            (false, false) => self.write(&source.to_bytes()?),
        }
    }

    /// Overwrites the elements of an F32 tensor with `values` from the host.
    ///
    /// # Errors
    /// When the data type is another or there are not as many elements, or this tensor is a read-only view of shared
    /// memory.
    pub fn set_f32(&mut self, values: &[f32]) -> Result<()> {
        self.check_dtype("tensor", DType::F32)?;
        check_length(&self.shape, self.dtype, size_of_val(values))?;
        self.write(bytemuck::cast_slice(values))
    }

    /// Overwrites the elements of a U32 tensor with `values` from the host.
    ///
    /// # Errors
    /// As [`Tensor::set_f32`].
    pub fn set_u32(&mut self, values: &[u32]) -> Result<()> {
        self.check_dtype("tensor", DType::U32)?;
        check_length(&self.shape, self.dtype, size_of_val(values))?;
        self.write(bytemuck::cast_slice(values))
    }

    /// Copies the bytes `range` of `source`, on the same device, over those from byte `offset` on.
    pub(crate) fn copy_bytes(
        &mut self,
        offset: usize,
        source: &Tensor,
        range: Range<usize>,
    ) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let (Storage::Cuda { buffer, largest }, Backend::Cuda(cuda)) =
            (&mut self.storage, self.device.backend())
            && let Storage::Cuda {
                buffer: source,
                largest: of_source,
            } = &source.storage
        {
            largest.set(of_source.get());
            return cuda.copy(source, range, buffer, offset);
        }
        let source = &source.bytes("source")?[range];
        self.bytes_mut("target")?[offset..][..source.len()].copy_from_slice(source);
        Ok(())
    }

    /// Copies the elements' bytes to the host.
    fn read(&self, bytes: &mut [u8]) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let (Storage::Cuda { buffer, .. }, Backend::Cuda(cuda)) =
            (&self.storage, self.device.backend())
        {
            return cuda.download(buffer, bytes);
        }
        bytes.copy_from_slice(self.bytes("tensor")?);
        Ok(())
    }

    /// Copies the elements' bytes, all of them, from the host.
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let (Storage::Cuda { buffer, largest }, Backend::Cuda(cuda)) =
            (&mut self.storage, self.device.backend())
        {
            if self.dtype == DType::U32 {
                largest.set(Largest::of(&bytemuck::pod_collect_to_vec::<u8, u32>(bytes)));
            }
            return cuda.upload(bytes, buffer);
        }
        self.bytes_mut("tensor")?.copy_from_slice(bytes);
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

    #[cfg_attr(
        not(feature = "cuda"),
        expect(unused_variables, reason = "every tensor is on the cpu")
    )]
    pub(crate) fn bytes(&self, name: &str) -> Result<&[u8]> {
        match &self.storage {
            Storage::Owned(buffer) => Ok(buffer.bytes()),
            Storage::Shared(bytes) => Ok(bytes),
            #[cfg(feature = "cuda")]
            Storage::Cuda { .. } => Err(self.not_on_the_cpu(name)),
        }
    }

    pub(crate) fn bytes_mut(&mut self, name: &str) -> Result<&mut [u8]> {
        #[cfg(feature = "cuda")]
        if matches!(self.storage, Storage::Cuda { .. }) {
            return Err(self.not_on_the_cpu(name));
        }
        match &mut self.storage {
            Storage::Owned(buffer) => Ok(buffer.bytes_mut()),
            _ => Err(Error::ReadOnly { name: name.into() }),
        }
    }

    /// The largest element of a U32 tensor, and where it stands. On a CUDA device it is known from the last copy from
    /// the host: no operation writes indices.
    pub(crate) fn largest_index(&self, name: &str) -> Result<Option<Largest>> {
        self.check_dtype(name, DType::U32)?;
        #[cfg(feature = "cuda")]
        if let Storage::Cuda { largest, .. } = &self.storage {
            return Ok(largest.get());
        }
        Ok(Largest::of(self.u32(name)?))
    }

    /// Lets a graph that is being captured repeat the check that these indices are below `limit`.
    #[cfg(feature = "cuda")]
    pub(crate) fn note_index_check(&self, name: &str, limit: usize) {
        if let (Storage::Cuda { largest, .. }, Backend::Cuda(cuda)) =
            (&self.storage, self.device.backend())
        {
            cuda.note_index_check(name, largest, limit);
        }
    }

    #[cfg(feature = "cuda")]
    fn not_on_the_cpu(&self, name: &str) -> Error {
        Error::Device {
            name: name.into(),
            expected: "the cpu".into(),
            found: self.device.to_string(),
        }
    }

    /// The elements for a kernel that reads them; those of a tensor that is elsewhere are none.
    #[cfg(feature = "cuda")]
    pub(crate) fn operand(&self) -> fuselora_kernels::Operand<'_> {
        match &self.storage {
            Storage::Cuda { buffer, .. } => cuda::operand(buffer, self.dtype),
            _ => cuda::no_operand(self.dtype),
        }
    }

    /// The elements for a kernel that writes them; those of a tensor that is elsewhere are none.
    #[cfg(feature = "cuda")]
    pub(crate) fn operand_mut(&mut self) -> fuselora_kernels::OperandMut<'_> {
        match &mut self.storage {
            Storage::Cuda { buffer, .. } => cuda::operand_mut(buffer, self.dtype),
            _ => cuda::no_operand_mut(self.dtype),
        }
    }

    pub(crate) fn f32(&self, name: &str) -> Result<&[f32]> {
        self.check_dtype(name, DType::F32)?;
        Ok(bytemuck::cast_slice(self.bytes(name)?))
    }

    pub(crate) fn f32_mut(&mut self, name: &str) -> Result<&mut [f32]> {
        self.check_dtype(name, DType::F32)?;
        Ok(bytemuck::cast_slice_mut(self.bytes_mut(name)?))
    }

    pub(crate) fn u32(&self, name: &str) -> Result<&[u32]> {
        self.check_dtype(name, DType::U32)?;
        Ok(bytemuck::cast_slice(self.bytes(name)?))
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
