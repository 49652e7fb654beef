//! Reading a GGUF header: metadata and the list of tensors. All of it is untrusted.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3, little endian.

use std::collections::BTreeMap;

use super::{
    GgmlType,
    metadata::{Metadata, MetadataValue},
};

/// A tensor's entry in the header.
#[derive(Debug, Clone)]
pub(super) struct TensorEntry {
    pub name: String,
    /// Outermost first; the file stores them innermost first.
    pub shape: Vec<usize>,
    pub ggml: GgmlType,
    /// From the start of the file.
    pub start: usize,
    pub stop: usize,
}

pub(super) struct Header {
    pub metadata: Metadata,
    pub tensors: Vec<TensorEntry>,
}

/// Reads the header of `file`, and checks every tensor's range against its length.
pub(super) fn read_header(file: &[u8]) -> Result<Header, String> {
    let mut reader = Reader { rest: file };
    if reader.take::<4>()? != *b"GGUF" {
        return Err("is no GGUF file".into());
    }
    match reader.u32()? {
        2 | 3 => {}
        version if version.swap_bytes() < 16 => {
            return Err("is a big-endian GGUF file, which is not supported".into());
        }
        version => {
            return Err(format!(
                "has GGUF version {version}; versions 2 and 3 are supported"
            ));
        }
    }
    let tensor_count = reader.u64()?;
    let metadata_count = reader.u64()?;

    let mut metadata = BTreeMap::new();
    for _ in 0..metadata_count {
        let key = reader.string()?;
        let kind = reader.u32()?;
        let value = reader
            .value(kind)
            .map_err(|error| format!("metadata key `{key}`: {error}"))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("has the metadata key `{key}` twice"));
        }
    }
    let metadata = Metadata(metadata);
    let alignment = match metadata.unsigned("general.alignment") {
        None => 32,
        Some(alignment) if alignment.is_power_of_two() && alignment <= 1 << 20 => {
            alignment as usize
        }
        Some(alignment) => {
            return Err(format!(
                "has an alignment of {alignment}, which is no power of two up to 2^20"
            ));
        }
    };

    let mut entries = Vec::new();
    for _ in 0..tensor_count {
        let name = reader.string()?;
        let entry = reader
            .tensor_entry()
            .map_err(|error| format!("tensor `{name}`: {error}"))?;
        entries.push((name, entry));
    }
    let data_start = (file.len() - reader.rest.len()).next_multiple_of(alignment);
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, (shape, ggml, offset)) in entries {
        let bytes = crate::checkpoint::StoredType::Ggml(ggml)
            .size_in_bytes(&shape)
            .ok_or_else(|| {
                format!("tensor `{name}`: its shape {shape:?} holds no whole {ggml} blocks")
            })?;
        if !offset.is_multiple_of(alignment as u64) {
            return Err(format!(
                "tensor `{name}`: starts at byte {offset}, which is no multiple of {alignment}"
            ));
        }
        let range = usize::try_from(offset)
            .ok()
            .and_then(|offset| data_start.checked_add(offset))
            .and_then(|start| Some((start, start.checked_add(bytes)?)))
            .filter(|&(_, stop)| stop <= file.len());
        let (start, stop) = range.ok_or_else(|| {
            format!("tensor `{name}`: its {bytes} bytes at {offset} do not fit the file of {} bytes: it is truncated or corrupt", file.len())
        })?;
        tensors.push(TensorEntry {
            name,
            shape,
            ggml,
            start,
            stop,
        });
    }
    tensors.sort_by_key(|tensor| tensor.start);
    for pair in tensors.windows(2) {
        if pair[1].start < pair[0].stop {
            return Err(format!(
                "tensor `{}`: overlaps the tensor `{}`",
                pair[1].name, pair[0].name
            ));
        }
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(format!("tensor `{}`: is there twice", pair[0].name));
    }
    Ok(Header { metadata, tensors })
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (head, rest) = self
            .rest
            .split_first_chunk()
            .ok_or("is truncated: its header ends early")?;
        self.rest = rest;
        Ok(*head)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.take().map(u64::from_le_bytes)
    }

    /// A count of items that take at least `item_bytes` each: never more than the file can hold.
    fn count(&mut self, item_bytes: usize) -> Result<usize, String> {
        let count = self.u64()?;
        usize::try_from(count)
            .ok()
            .filter(|&count| count <= self.rest.len() / item_bytes)
            .ok_or_else(|| {
                format!("is truncated or corrupt: a length of {count} goes beyond the file")
            })
    }

    fn string(&mut self) -> Result<String, String> {
        let length = self.count(1)?;
        let (text, rest) = self.rest.split_at(length);
        self.rest = rest;
        String::from_utf8(text.to_vec()).map_err(|_| "holds text that is not UTF-8".into())
    }

    fn value(&mut self, kind: u32) -> Result<MetadataValue, String> {
        use MetadataValue::{Bool, Float, Signed, String, Unsigned};
        Ok(match kind {
            0 => Unsigned(self.take::<1>()?[0].into()),
            1 => Signed(i8::from_le_bytes(self.take()?).into()),
            2 => Unsigned(u16::from_le_bytes(self.take()?).into()),
            3 => Signed(i16::from_le_bytes(self.take()?).into()),
            4 => Unsigned(self.u32()?.into()),
            5 => Signed(i32::from_le_bytes(self.take()?).into()),
            6 => Float(f32::from_le_bytes(self.take()?).into()),
            7 => Bool(self.take::<1>()?[0] != 0),
            8 => String(self.string()?),
            9 => self.array(0)?,
            10 => Unsigned(self.u64()?),
            11 => Signed(i64::from_le_bytes(self.take()?)),
            12 => Float(f64::from_le_bytes(self.take()?)),
            other => return Err(format!("has the unknown type {other}")),
        })
    }

    fn array(&mut self, depth: usize) -> Result<MetadataValue, String> {
        use MetadataValue::{Bools, Floats, Integers, Nested, Strings};
        let kind = self.u32()?;
        Ok(match kind {
            0 => Integers(self.items(|b: [u8; 1]| b[0].into())?),
            1 => Integers(self.items(|b| i8::from_le_bytes(b).into())?),
            2 => Integers(self.items(|b| u16::from_le_bytes(b).into())?),
            3 => Integers(self.items(|b| i16::from_le_bytes(b).into())?),
            4 => Integers(self.items(|b| u32::from_le_bytes(b).into())?),
            5 => Integers(self.items(|b| i32::from_le_bytes(b).into())?),
            6 => Floats(self.items(f32::from_le_bytes)?),
            7 => Bools(self.items(|b: [u8; 1]| b[0] != 0)?),
            8 => {
                // A string takes at least the 8 bytes of its length.
                let count = self.count(8)?;
                Strings(
                    (0..count)
                        .map(|_| self.string())
                        .collect::<Result<_, _>>()?,
                )
            }
            9 if depth < 4 => {
                let count = self.count(12)?;
                for _ in 0..count {
                    self.array(depth + 1)?;
                }
                Nested(count as u64)
            }
            // An unsigned 64-bit value above i64's range is no token, size or count.
            10 | 11 => Integers(self.items(i64::from_le_bytes)?),
            12 => Floats(self.items(|b| f64::from_le_bytes(b) as f32)?),
            other => {
                return Err(format!(
                    "is an array of the unknown type {other}, or nested too deeply"
                ));
            }
        })
    }

    fn items<const N: usize, T>(
        &mut self,
        decode: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, String> {
        let count = self.count(N)?;
        let (items, rest) = self.rest.split_at(count * N);
        self.rest = rest;
        Ok(items
            .as_chunks()
            .0
            .iter()
            .map(|item| decode(*item))
            .collect())
    }

    fn tensor_entry(&mut self) -> Result<(Vec<usize>, GgmlType, u64), String> {
        let dimensions = self.u32()?;
        if dimensions > 4 {
            return Err(format!("has {dimensions} dimensions; GGUF allows 4"));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let extent = self.u64()?;
            shape.push(usize::try_from(extent).map_err(|_| format!("has an extent of {extent}"))?);
        }
        shape.reverse();
        let id = self.u32()?;
        let ggml = GgmlType::from_id(id).ok_or_else(|| {
            format!(
                "has the GGML type {id}, which cannot be read; known are {}",
                GgmlType::known()
            )
        })?;
        Ok((shape, ggml, self.u64()?))
    }
}
