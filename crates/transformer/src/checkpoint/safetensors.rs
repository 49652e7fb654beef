//! Reading the safetensors format: an 8-byte little-endian header length, a JSON header, the data.
//!
//! The header is untrusted. It is parsed from the mapped file, so its length is bounded by the file's;
//! every range is checked against the file, and the ranges must tile the data without holes or overlaps,
//! as the format demands. (The `safetensors` crate checks most of this too, but drops a repeated name
//! silently and does not say which tensor is wrong.)

use std::{collections::BTreeMap, fmt, path::Path};

use bytes::Bytes;
use serde::{
    Deserialize,
    de::{IgnoredAny, MapAccess, Visitor},
};

use super::{MappedFile, StoredTensor, StoredType};
use crate::error::{Error, Result};

/// The tensors of one safetensors file, which stays mapped as long as one of them lives.
pub(crate) fn read(path: &Path) -> Result<BTreeMap<String, StoredTensor>> {
    let file = MappedFile::open(path)?;
    let mut tensors = read_bytes(path, file.bytes())?;
    for tensor in tensors.values_mut() {
        tensor.set_file(file.clone());
    }
    Ok(tensors)
}

pub(crate) fn read_bytes(path: &Path, file: Bytes) -> Result<BTreeMap<String, StoredTensor>> {
    let bad = |message: String| Error::file(path, message);
    let (length, rest) = file.split_first_chunk::<8>().ok_or_else(|| {
        bad(format!(
            "is truncated: {} bytes hold no safetensors header",
            file.len()
        ))
    })?;
    let length = u64::from_le_bytes(*length);
    let header = usize::try_from(length).ok().and_then(|length| rest.get(..length)).ok_or_else(|| {
        bad(format!("is truncated or no safetensors file: its header of {length} bytes does not fit its {} bytes", file.len()))
    })?;
    let header: Header = serde_json::from_slice(header)
        .map_err(|error| bad(format!("has a corrupt safetensors header: {error}")))?;
    let data = file.slice(8 + length as usize..);

    let mut entries = header.0;
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut tensors = BTreeMap::new();
    let mut end = 0;
    for (
        name,
        Entry {
            dtype,
            shape,
            data_offsets: [start, stop],
        },
    ) in entries
    {
        let bad = |message: String| Error::stored_tensor(path, &name, message);
        let stored = StoredType::from_safetensors(&dtype).ok_or_else(|| {
            bad(format!(
                "has the unknown data type {dtype}; known are {}",
                StoredType::known_safetensors()
            ))
        })?;
        if start != end {
            let kind = if start < end {
                "overlaps the tensor before it"
            } else {
                "leaves a hole before it"
            };
            return Err(bad(format!(
                "{kind}: it starts at byte {start}, and the one before ends at {end}"
            )));
        }
        if stop < start || stop > data.len() as u64 {
            return Err(bad(format!(
                "takes bytes {start} to {stop}, and the file holds {}: it is truncated or corrupt",
                data.len()
            )));
        }
        let expected = stored.size_in_bytes(&shape);
        if expected != Some((stop - start) as usize) {
            return Err(bad(format!(
                "has {} bytes, which do not fit shape {shape:?} of {stored}",
                stop - start
            )));
        }
        end = stop;
        let bytes = data.slice(start as usize..stop as usize);
        let tensor = StoredTensor::new(path, shape, stored, bytes);
        if tensors.insert(name.clone(), tensor).is_some() {
            return Err(Error::stored_tensor(path, name, "is there twice"));
        }
    }
    if end != data.len() as u64 {
        return Err(bad(format!(
            "has {} bytes behind its last tensor",
            data.len() as u64 - end
        )));
    }
    Ok(tensors)
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// Name and entry pairs in the header's order, repeated names included.
struct Header(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(
        deserializer: D,
    ) -> std::result::Result<Header, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a map of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(header: &str, data: usize) -> Bytes {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(vec![0; data]);
        bytes.into()
    }

    fn error(header: &str, data: usize) -> String {
        read_bytes(Path::new("m.safetensors"), file(header, data))
            .err()
            .expect("a refusal")
            .to_string()
    }

    const GOOD: &str = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F16","shape":[2,3],"data_offsets":[8,20]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

    #[test]
    fn reads_tensors_in_any_order() {
        let tensors = read_bytes(Path::new("m"), file(GOOD, 20)).unwrap();
        assert_eq!(tensors.keys().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(tensors["b"].info().shape, [2, 3]);
    }

    #[test]
    fn refusals_name_file_and_tensor() {
        let cases = [
            (GOOD, 19, "`b`: takes bytes 8 to 20"),
            (GOOD, 21, "1 bytes behind"),
            (
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
                12,
                "`a`: leaves a hole",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}"#,
                6,
                "`b`: overlaps",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
                8,
                "`a`: is there twice",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,4]}}"#,
                4,
                "`a`: has 4 bytes",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[18446744073709551615,8],"data_offsets":[0,4]}}"#,
                4,
                "`a`: has 4 bytes",
            ),
            (
                r#"{"a":{"dtype":"Q9","shape":[1],"data_offsets":[0,4]}}"#,
                4,
                "unknown data type Q9",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#,
                4,
                "`a`: leaves a hole",
            ),
            (r#"{"a":{"dtype":"F32"}}"#, 4, "corrupt safetensors header"),
            ("[1]", 4, "corrupt safetensors header"),
        ];
        for (header, data, expected) in cases {
            let error = error(header, data);
            assert!(
                error.contains(expected) && error.contains("m.safetensors"),
                "{error}"
            );
        }
        for bytes in [
            Bytes::new(),
            Bytes::from_static(&[255; 8]),
            Bytes::from_static(&[9, 0, 0, 0, 0, 0, 0, 0, b'{']),
        ] {
            let error = read_bytes(Path::new("m"), bytes).err().unwrap().to_string();
            assert!(error.contains("is truncated"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn mutated_files_never_panic(at in 0usize..200, value: u8, cut in 0usize..220) {
            let mut bytes = file(GOOD, 20).to_vec();
            let at = at % bytes.len();
            bytes[at] = value;
            bytes.truncate(bytes.len() - cut.saturating_sub(20).min(bytes.len()));
            if let Ok(tensors) = read_bytes(Path::new("m"), bytes.into()) {
                for (name, tensor) in tensors {
                    let _ = tensor.to_f32(&name);
                }
            }
        }
    }
}
