//! A tensor as it lies in a file, and how it becomes numbers.

use std::{
    fmt,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use fuselora_tensor::{DType, Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::MappedFile;
use crate::{
    error::{Error, Result},
    gguf::GgmlType,
};

/// What a file says about one of its tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// The type of the stored elements.
    pub dtype: StoredType,
}

/// The type of a stored tensor's elements: a plain safetensors type, or one of GGUF's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum StoredType {
    Bool,
    U8,
    I8,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    I64,
    U64,
    F64,
    /// A type of GGUF, most of them quantized in blocks.
    Ggml(GgmlType),
    /// bitsandbytes' 4-bit NormalFloat; its statistics are apart.
    Nf4,
}

impl StoredType {
    /// The float type that holds it without loss, or f32.
    pub(crate) fn float_dtype(self) -> DType {
        match self {
            StoredType::F16 => DType::F16,
            StoredType::BF16 => DType::BF16,
            _ => DType::F32,
        }
    }
}

const SAFETENSORS_TYPES: [(&str, StoredType, usize); 13] = [
    ("BOOL", StoredType::Bool, 1),
    ("U8", StoredType::U8, 1),
    ("I8", StoredType::I8, 1),
    ("I16", StoredType::I16, 2),
    ("U16", StoredType::U16, 2),
    ("F16", StoredType::F16, 2),
    ("BF16", StoredType::BF16, 2),
    ("I32", StoredType::I32, 4),
    ("U32", StoredType::U32, 4),
    ("F32", StoredType::F32, 4),
    ("I64", StoredType::I64, 8),
    ("U64", StoredType::U64, 8),
    ("F64", StoredType::F64, 8),
];

impl StoredType {
    pub(crate) fn from_safetensors(name: &str) -> Option<StoredType> {
        SAFETENSORS_TYPES
            .iter()
            .find(|(known, ..)| *known == name)
            .map(|&(_, stored, _)| stored)
    }

    pub(crate) fn known_safetensors() -> String {
        SAFETENSORS_TYPES.map(|(name, ..)| name).join(", ")
    }

    /// Bytes that a tensor of this type takes; `None` where that overflows or the rows hold no whole blocks.
    pub fn size_in_bytes(self, shape: &[usize]) -> Option<usize> {
        let count = shape
            .iter()
            .try_fold(1usize, |count, &extent| count.checked_mul(extent))?;
        match self {
            StoredType::Ggml(ggml) => {
                let row = shape.last().copied().unwrap_or(1);
                (row.is_multiple_of(ggml.block_len()))
                    .then(|| (count / ggml.block_len()).checked_mul(ggml.block_bytes()))?
            }
            StoredType::Nf4 => Some(count.div_ceil(2)),
            _ => count.checked_mul(self.element_bytes()),
        }
    }

    fn element_bytes(self) -> usize {
        SAFETENSORS_TYPES
            .iter()
            .find(|(_, stored, _)| *stored == self)
            .map_or(1, |&(.., bytes)| bytes)
    }

    /// The tensor type with the same memory layout, where there is one.
    fn same_layout(self) -> Option<DType> {
        match self {
            StoredType::F32 | StoredType::Ggml(GgmlType::F32) => Some(DType::F32),
            StoredType::F16 | StoredType::Ggml(GgmlType::F16) => Some(DType::F16),
            StoredType::BF16 | StoredType::Ggml(GgmlType::BF16) => Some(DType::BF16),
            StoredType::U32 => Some(DType::U32),
            StoredType::U8 | StoredType::Bool => Some(DType::U8),
            _ => None,
        }
    }

    fn is_float(self) -> bool {
        matches!(
            self,
            StoredType::F16
                | StoredType::BF16
                | StoredType::F32
                | StoredType::F64
                | StoredType::Ggml(_)
        )
    }
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoredType::Ggml(ggml) => ggml.fmt(f),
            StoredType::Nf4 => f.write_str("NF4"),
            plain => f.write_str(
                SAFETENSORS_TYPES
                    .iter()
                    .find(|(_, stored, _)| stored == plain)
                    .map_or("?", |t| t.0),
            ),
        }
    }
}

/// Where a tensor's row lies in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowOrder {
    /// In its place.
    AsStored,
    /// The rows of each head are stored in the order that rotary embeddings over neighbouring pairs want,
    /// and are read in the order that rotary embeddings over halves want (GGUF's q and k of Llama).
    PairsToHalves {
        /// Rows of a head; even.
        head_dim: usize,
    },
}

impl RowOrder {
    /// The stored row that becomes row `row`.
    pub(crate) fn stored_row(self, row: usize) -> usize {
        match self {
            RowOrder::AsStored => row,
            RowOrder::PairsToHalves { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
                head * head_dim + 2 * pair + half
            }
        }
    }
}

/// A tensor in a mapped file, whose bytes were checked to fit its shape.
#[derive(Clone)]
pub(crate) struct StoredTensor {
    path: Arc<PathBuf>,
    info: TensorInfo,
    bytes: Bytes,
    /// What the bytes are mapped from.
    file: Option<MappedFile>,
    order: RowOrder,
}

impl StoredTensor {
    /// `bytes` are exactly those of the shape.
    pub(crate) fn new(
        path: &Path,
        shape: Vec<usize>,
        dtype: StoredType,
        bytes: Bytes,
    ) -> StoredTensor {
        debug_assert_eq!(dtype.size_in_bytes(&shape), Some(bytes.len()));
        StoredTensor {
            path: Arc::new(path.to_owned()),
            info: TensorInfo { shape, dtype },
            bytes,
            file: None,
            order: RowOrder::AsStored,
        }
    }

    /// Says which file the bytes are mapped from.
    pub(crate) fn set_file(&mut self, file: MappedFile) {
        self.file = Some(file);
    }

    /// Gives the memory back that the bytes take for having been read.
    pub(super) fn release(&self) {
        if let Some(file) = &self.file {
            file.release(&self.bytes);
        }
    }

    /// The same tensor with its rows read in another order; an error where they form no whole heads.
    pub(crate) fn with_order(self, order: RowOrder) -> std::result::Result<StoredTensor, String> {
        if let RowOrder::PairsToHalves { head_dim } = order {
            let rows = self.info.shape.first().copied().unwrap_or(0);
            if rows == 0 || !rows.is_multiple_of(head_dim) {
                return Err(format!(
                    "has shape {:?}, which holds no whole heads of {head_dim} rows",
                    self.info.shape
                ));
            }
            if self
                .info
                .dtype
                .size_in_bytes(&self.info.shape[1..])
                .is_none()
            {
                return Err(format!(
                    "has shape {:?}, whose rows hold no whole blocks",
                    self.info.shape
                ));
            }
        }
        Ok(StoredTensor { order, ..self })
    }

    pub(crate) fn info(&self) -> &TensorInfo {
        &self.info
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The elements as they are stored.
    pub(super) fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    pub(super) fn into_bytes(self) -> Bytes {
        self.bytes
    }

    fn count(&self) -> usize {
        self.info.shape.iter().product()
    }

    /// Elements that are decoded as one: along the last dimension, or along all but the first where the
    /// first is reordered (a bias then has rows of one element).
    fn row_len(&self) -> usize {
        match self.order {
            RowOrder::AsStored => self.info.shape.last().copied().unwrap_or(1),
            RowOrder::PairsToHalves { .. } => self.info.shape[1..].iter().product(),
        }
    }

    fn refuse(&self, name: &str, message: impl Into<String>) -> Error {
        Error::stored_tensor(&*self.path, name, message)
    }

    /// Decodes a range of rows into `out`, which holds exactly those.
    fn decode_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let row_len = self.row_len();
        let row_bytes = self.bytes.len() / (self.count() / row_len);
        for (row, out) in rows.zip(out.chunks_exact_mut(row_len)) {
            let at = self.order.stored_row(row) * row_bytes;
            decode_row(self.info.dtype, &self.bytes[at..at + row_bytes], out);
        }
    }

    /// All elements as f32.
    pub(crate) fn to_f32(&self, name: &str) -> Result<Vec<f32>> {
        let mut values = vec![0f32; self.count()];
        self.write_to(name, DType::F32, bytemuck::cast_slice_mut(&mut values))?;
        self.release();
        Ok(values)
    }

    /// All elements as little-endian bytes of `dtype`.
    pub(crate) fn to_bytes(&self, name: &str, dtype: DType) -> Result<Vec<u8>> {
        let mut bytes = vec![0u8; self.count() * dtype.size_in_bytes()];
        self.write_to(name, dtype, &mut bytes)?;
        self.release();
        Ok(bytes)
    }

    /// Writes all elements as `dtype` into `out`, which holds exactly those.
    fn write_to(&self, name: &str, dtype: DType, out: &mut [u8]) -> Result<()> {
        let stored = self.info.dtype;
        if stored.same_layout() == Some(dtype) && self.order == RowOrder::AsStored {
            out.copy_from_slice(&self.bytes);
            return Ok(());
        }
        if !stored.is_float() || !dtype.is_float() {
            return Err(self.refuse(
                name,
                format!("holds {stored}, which cannot be read as {dtype}"),
            ));
        }
        if out.is_empty() {
            return Ok(());
        }
        let row_len = self.row_len();
        // Enough work for a thread, and a buffer that stays in its cache.
        let rows_per_task = (16_384 / row_len).max(1);
        let fits = out
            .par_chunks_mut(rows_per_task * row_len * dtype.size_in_bytes())
            .enumerate()
            .map_init(Vec::new, |values, (task, out)| {
                let rows = out.len() / (row_len * dtype.size_in_bytes());
                values.resize(rows * row_len, 0f32);
                let first = task * rows_per_task;
                self.decode_rows(first..first + rows, values);
                encode(values, dtype, out)
            })
            .reduce(|| true, |a, b| a && b);
        if !fits {
            return Err(self.refuse(
                name,
                format!("holds values too large for {dtype}; read it as bf16 or f32"),
            ));
        }
        Ok(())
    }

    /// The tensor on a device. Where the file holds `dtype` already, the CPU reads the mapped file itself.
    pub(crate) fn load(&self, name: &str, device: &Device, dtype: DType) -> Result<Tensor> {
        let in_place =
            self.info.dtype.same_layout() == Some(dtype) && self.order == RowOrder::AsStored;
        let bytes = if in_place {
            self.bytes.clone()
        } else {
            self.to_bytes(name, dtype)?.into()
        };
        Ok(Tensor::from_shared(
            device,
            self.info.shape.as_slice(),
            dtype,
            bytes,
        )?)
    }

    /// The tensor on a device, in memory of its own that can be changed.
    pub(crate) fn load_owned(&self, name: &str, device: &Device, dtype: DType) -> Result<Tensor> {
        Ok(Tensor::from_bytes(
            device,
            self.info.shape.as_slice(),
            dtype,
            &self.to_bytes(name, dtype)?,
        )?)
    }
}

fn decode_row(stored: StoredType, bytes: &[u8], out: &mut [f32]) {
    fn each<const N: usize>(bytes: &[u8], out: &mut [f32], decode: impl Fn([u8; N]) -> f32) {
        for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
            *out = decode(*bytes);
        }
    }
    match stored {
        StoredType::F32 => each(bytes, out, f32::from_le_bytes),
        StoredType::F16 => each(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        StoredType::BF16 => each(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        StoredType::F64 => each(bytes, out, |b| f64::from_le_bytes(b) as f32),
        StoredType::Ggml(ggml) => ggml.dequantize(bytes, out),
        _ => unreachable!("only floats are decoded"),
    }
}

/// Writes `values` as `dtype`, rounded to nearest even; false where a finite value became infinite.
fn encode(values: &[f32], dtype: DType, out: &mut [u8]) -> bool {
    fn each<const N: usize>(values: &[f32], out: &mut [u8], encode: impl Fn(f32) -> [u8; N]) {
        for (out, &value) in out.as_chunks_mut::<N>().0.iter_mut().zip(values) {
            *out = encode(value);
        }
    }
    match dtype {
        DType::F16 => each(values, out, |v| f16::from_f32(v).to_le_bytes()),
        DType::BF16 => each(values, out, |v| bf16::from_f32(v).to_le_bytes()),
        _ => each(values, out, f32::to_le_bytes),
    }
    // The largest f16 is 65504; from 65520 on, values round to infinity.
    dtype != DType::F16 || values.iter().all(|v| v.abs() < 65_520.0 || !v.is_finite())
}
