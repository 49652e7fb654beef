//! Writing a GGUF file, version 3.

use std::io::Write;
use std::path::Path;

use fuselora_tensor::DType;

use super::GgmlType;
use crate::atomic_file;
use crate::checkpoint::TensorSpec;
use crate::error::{Error, Result};

/// Tensors start at multiples of it, the format's default.
const ALIGNMENT: u64 = 32;

/// A value of the metadata.
pub(crate) enum Value<'a> {
    Float(f32),
    String(&'a str),
}

/// Writes one GGUF file at `path`, with `contents` asked for each tensor's little-endian bytes in turn.
///
/// # Errors
/// An error of `contents`, an element type that GGUF has not, bytes that do not fit, or a file that cannot be written.
pub(crate) fn write(
    path: &Path,
    metadata: &[(&str, Value)],
    tensors: &[TensorSpec],
    mut contents: impl FnMut(&TensorSpec) -> Result<Vec<u8>>,
) -> Result<()> {
    let mut header = b"GGUF".to_vec();
    header.extend(3u32.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        push_string(&mut header, key);
        match value {
            Value::Float(value) => {
                header.extend(6u32.to_le_bytes());
                header.extend(value.to_le_bytes());
            }
            Value::String(value) => {
                header.extend(8u32.to_le_bytes());
                push_string(&mut header, value);
            }
        }
    }
    let mut offset = 0;
    for tensor in tensors {
        push_string(&mut header, &tensor.name);
        header.extend((tensor.shape.len() as u32).to_le_bytes());
        for &extent in tensor.shape.iter().rev() {
            header.extend((extent as u64).to_le_bytes());
        }
        header.extend(ggml_type(tensor.dtype)?.id().to_le_bytes());
        header.extend(u64::to_le_bytes(offset));
        offset += tensor.size_in_bytes().next_multiple_of(ALIGNMENT);
    }
    pad(&mut header);
    atomic_file::write_file(path, |file| {
        let mut write = |bytes: &[u8]| {
            file.write_all(bytes)
                .map_err(|error| Error::io(path, error))
        };
        write(&header)?;
        for tensor in tensors {
            let mut bytes = contents(tensor)?;
            if bytes.len() as u64 != tensor.size_in_bytes() {
                return Err(Error::stored_tensor(
                    path,
                    &tensor.name,
                    format!("{} bytes do not fit its shape", bytes.len()),
                ));
            }
            pad(&mut bytes);
            write(&bytes)?;
        }
        Ok(())
    })
}

fn push_string(header: &mut Vec<u8>, string: &str) {
    header.extend((string.len() as u64).to_le_bytes());
    header.extend(string.as_bytes());
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT as usize), 0);
}

fn ggml_type(dtype: DType) -> Result<GgmlType> {
    match dtype {
        DType::F32 => Ok(GgmlType::F32),
        DType::F16 => Ok(GgmlType::F16),
        DType::BF16 => Ok(GgmlType::BF16),
        other => Err(Error::Input(format!("GGUF has no type for {other}"))),
    }
}
