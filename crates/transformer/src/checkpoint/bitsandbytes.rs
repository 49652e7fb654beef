//! NF4 weights as bitsandbytes stores them in safetensors files (`docs/quantization.md`).
//!
//! A weight is a group of tensors: `weight` (the codes), `weight.absmax`, `weight.quant_map`, with double quantization
//! `weight.nested_absmax` and `weight.nested_quant_map`, and JSON in `weight.quant_state.bitsandbytes__nf4`. Groups are
//! untrusted: each is checked when the checkpoint is opened.

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use fuselora_tensor::nf4::{self, Absmax, NestedAbsmax};
use fuselora_tensor::{DType, Device, Nf4Weight, Tensor};
use serde::Deserialize;
use serde_json::Value;

use super::{StoredTensor, StoredType, TensorInfo, TensorSpec};
use crate::convert::torch_dtype;
use crate::error::{Error, Result};

const QUANT_STATE: &str = ".quant_state.bitsandbytes__";
const STATISTICS: [&str; 4] = [
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
];

/// One weight in a checkpoint's files, checked.
pub(crate) struct StoredNf4 {
    info: TensorInfo,
    /// The type that the weight had.
    source_dtype: DType,
    block_size: usize,
    packed: Bytes,
    absmax: Bytes,
    nested: Option<Nested>,
}

struct Nested {
    quant_map: Bytes,
    absmax: Bytes,
    offset: f32,
}

/// The JSON of a weight.
#[derive(Deserialize)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

/// Fails where `config.json` names a quantization that is not read here.
pub(super) fn check_config(config: &Value) -> Result<()> {
    let Some(quantization) = config
        .get("quantization_config")
        .filter(|value| !value.is_null())
    else {
        return Ok(());
    };
    let refuse = |key: &str, supported: &str| {
        let found = quantization.get(key).unwrap_or(&Value::Null);
        Err(Error::config(format!(
            "`quantization_config.{key}` is {found}, which is not supported; supported: {supported}"
        )))
    };
    if quantization.get("quant_method") != Some(&"bitsandbytes".into()) {
        return refuse("quant_method", "\"bitsandbytes\"");
    }
    if quantization.get("load_in_4bit") != Some(&true.into()) {
        return refuse("load_in_4bit", "true");
    }
    match quantization.get("bnb_4bit_quant_type") {
        Some(kind) if kind == "nf4" => Ok(()),
        // Where the key is missing bitsandbytes takes fp4.
        _ => refuse("bnb_4bit_quant_type", "\"nf4\""),
    }
}

/// Takes the groups of all NF4 weights out of `tensors`.
pub(super) fn take_weights(
    tensors: &mut BTreeMap<String, StoredTensor>,
) -> Result<BTreeMap<String, StoredNf4>> {
    let states: Vec<String> = tensors
        .keys()
        .filter(|name| name.contains(QUANT_STATE))
        .cloned()
        .collect();
    let mut weights = BTreeMap::new();
    for state in states {
        if let Some((weight, kind)) = state.split_once(QUANT_STATE) {
            weights.insert(weight.to_owned(), take_weight(tensors, weight, kind)?);
        }
    }
    let orphan = tensors.iter().find_map(|(name, tensor)| {
        let mut weights = STATISTICS.iter().filter_map(|part| name.strip_suffix(part));
        weights
            .find(|weight| weight.ends_with("weight"))
            .map(|weight| (name, tensor, weight.to_owned()))
    });
    if let Some((name, tensor, weight)) = orphan {
        let message = format!("has no {weight}{QUANT_STATE}nf4, which says how to read it");
        return Err(Error::stored_tensor(tensor.path(), name, message));
    }
    Ok(weights)
}

fn take_weight(
    tensors: &mut BTreeMap<String, StoredTensor>,
    weight: &str,
    kind: &str,
) -> Result<StoredNf4> {
    let state_name = format!("{weight}{QUANT_STATE}{kind}");
    let state = take(tensors, &state_name, Path::new(&state_name))?;
    let path = state.path().to_owned();
    let bad = |message: String| Error::stored_tensor(&path, &state_name, message);
    let QuantState {
        quant_type,
        blocksize,
        dtype,
        shape,
        nested_blocksize,
        nested_dtype,
        nested_offset,
    } = serde_json::from_slice(state.bytes())
        .map_err(|error| bad(format!("holds no quantization state: {error}")))?;
    if kind != "nf4" || quant_type != "nf4" {
        let found = if kind == "nf4" { &quant_type } else { kind };
        return Err(bad(format!(
            "has quant_type \"{found}\", which is not supported; supported: nf4"
        )));
    }
    nf4::check_block_size(blocksize).map_err(|error| bad(error.to_string()))?;
    let source_dtype = match dtype.as_str() {
        "float32" => DType::F32,
        "float16" => DType::F16,
        "bfloat16" => DType::BF16,
        _ => {
            return Err(bad(format!(
                "has dtype \"{dtype}\"; float32, float16 and bfloat16 are known"
            )));
        }
    };
    let count = match shape[..] {
        [rows, columns] => rows.checked_mul(columns).filter(|&count| count > 0),
        _ => None,
    };
    let count = count.ok_or_else(|| bad(format!("has shape {shape:?}, which is no matrix")))?;
    let blocks = count.div_ceil(blocksize);

    // Any storage type: the bytes of the codes are what counts.
    let packed = take(tensors, weight, &path)?;
    if packed.bytes().len() != count.div_ceil(2) {
        return Err(Error::stored_tensor(
            packed.path(),
            weight,
            format!(
                "has {} bytes, and shape {shape:?} in {state_name} wants {}",
                packed.bytes().len(),
                count.div_ceil(2)
            ),
        ));
    }
    let mut part = |part: &str, dtype: StoredType, len: usize| {
        let name = format!("{weight}.{part}");
        let tensor = take(tensors, &name, &path)?;
        let TensorInfo {
            shape: found,
            dtype: stored,
        } = tensor.info();
        if *stored != dtype || found[..] != [len] {
            let message = format!(
                "has shape {found:?} of {stored}, and {state_name} wants [{len}] of {dtype}"
            );
            return Err(Error::stored_tensor(tensor.path(), &name, message));
        }
        Ok(tensor)
    };
    let quant_map = part("quant_map", StoredType::F32, nf4::QUANT_MAP.len())?;
    if quant_map.bytes()[..] != *bytemuck::cast_slice::<f32, u8>(&nf4::QUANT_MAP) {
        let message = "holds other values than those of NF4";
        return Err(Error::stored_tensor(
            &path,
            format!("{weight}.quant_map"),
            message,
        ));
    }
    let (absmax, nested) = match nested_blocksize {
        None => (part("absmax", StoredType::F32, blocks)?, None),
        Some(nf4::NESTED_BLOCK_SIZE) => {
            if nested_dtype.as_deref() != Some("float32") {
                return Err(bad(format!(
                    "has nested_dtype {nested_dtype:?}; float32 is known"
                )));
            }
            let offset = nested_offset.ok_or_else(|| bad("has no nested_offset".into()))? as f32;
            if !offset.is_finite() {
                return Err(bad("has a nested_offset that is no f32".into()));
            }
            let nested_blocks = blocks.div_ceil(nf4::NESTED_BLOCK_SIZE);
            let nested = Nested {
                quant_map: part("nested_quant_map", StoredType::F32, 256)?.into_bytes(),
                absmax: part("nested_absmax", StoredType::F32, nested_blocks)?.into_bytes(),
                offset,
            };
            (part("absmax", StoredType::U8, blocks)?, Some(nested))
        }
        Some(other) => {
            return Err(bad(format!(
                "has nested_blocksize {other}; {} is what is supported",
                nf4::NESTED_BLOCK_SIZE
            )));
        }
    };
    Ok(StoredNf4 {
        info: TensorInfo {
            shape,
            dtype: StoredType::Nf4,
        },
        source_dtype,
        block_size: blocksize,
        packed: packed.into_bytes(),
        absmax: absmax.into_bytes(),
        nested,
    })
}

fn take(
    tensors: &mut BTreeMap<String, StoredTensor>,
    name: &str,
    path: &Path,
) -> Result<StoredTensor> {
    tensors
        .remove(name)
        .ok_or_else(|| Error::stored_tensor(path, name, "is missing"))
}

impl StoredNf4 {
    pub(super) fn info(&self) -> &TensorInfo {
        &self.info
    }

    /// The type that the weight had before it was quantized.
    pub(crate) fn source_dtype(&self) -> DType {
        self.source_dtype
    }

    /// The weight on a device. The CPU reads the mapped file itself where its parts are aligned.
    pub(crate) fn load(&self, device: &Device) -> Result<Nf4Weight> {
        let floats = |bytes: &Bytes| {
            let len = bytes.len() / size_of::<f32>();
            Tensor::from_shared(device, [len], DType::F32, bytes.clone())
        };
        let codes =
            |bytes: &Bytes| Tensor::from_shared(device, [bytes.len()], DType::U8, bytes.clone());
        let absmax = match &self.nested {
            None => Absmax::Plain(floats(&self.absmax)?),
            Some(nested) => Absmax::Nested(Box::new(NestedAbsmax {
                absmax: codes(&self.absmax)?,
                quant_map: floats(&nested.quant_map)?,
                nested_absmax: floats(&nested.absmax)?,
                offset: nested.offset,
            })),
        };
        let [rows, columns] = self.info.shape[..] else {
            unreachable!("only matrices are taken")
        };
        let packed = codes(&self.packed)?;
        Ok(Nf4Weight::new(
            [rows, columns],
            self.block_size,
            packed,
            absmax,
        )?)
    }
}

/// The tensors that a weight is stored as, with their bytes.
pub type Nf4Parts = Vec<(TensorSpec, Vec<u8>)>;

/// `weight` in tensors named after `name`, as `Linear4bit` of bitsandbytes saves it; `source` is the type that it had.
///
/// # Errors
/// A source that is no float type.
pub fn nf4_tensors(name: &str, weight: &Nf4Weight, source: DType) -> Result<Nf4Parts> {
    let part = |part: &str, shape: Vec<usize>, dtype: DType, bytes: Vec<u8>| {
        let name = format!("{name}{part}");
        (TensorSpec { name, shape, dtype }, bytes)
    };
    let tensor = |of: &str, tensor: &Tensor| -> Result<_> {
        let shape = tensor.shape().to_vec();
        Ok(part(of, shape, tensor.dtype(), tensor.to_bytes()?))
    };
    let codes = weight.packed().to_bytes()?;
    let quant_map = bytemuck::cast_slice(&nf4::QUANT_MAP).to_vec();
    let [rows, columns] = **weight.shape() else {
        unreachable!("NF4 weights are matrices")
    };
    let mut state = format!(
        "\"quant_type\": \"nf4\", \"blocksize\": {}, \"dtype\": \"{}\", \"shape\": [{rows}, {columns}]",
        weight.block_size(),
        torch_dtype(source)?,
    );
    let mut parts = vec![
        part("", vec![codes.len(), 1], DType::U8, codes),
        part(
            ".quant_map",
            vec![nf4::QUANT_MAP.len()],
            DType::F32,
            quant_map,
        ),
    ];
    match weight.absmax() {
        Absmax::Plain(absmax) => parts.push(tensor(".absmax", absmax)?),
        Absmax::Nested(nested) => {
            parts.push(tensor(".absmax", &nested.absmax)?);
            parts.push(tensor(".nested_quant_map", &nested.quant_map)?);
            parts.push(tensor(".nested_absmax", &nested.nested_absmax)?);
            state += &format!(
                ", \"nested_blocksize\": {}, \"nested_dtype\": \"float32\", \"nested_offset\": {}",
                nf4::NESTED_BLOCK_SIZE,
                python_float(nested.offset.into()),
            );
        }
    }
    let state = format!("{{{state}}}").into_bytes();
    let len = state.len();
    parts.push(part(
        &format!("{QUANT_STATE}nf4"),
        vec![len],
        DType::U8,
        state,
    ));
    Ok(parts)
}

/// A number as Python's `repr` writes it: with an exponent of two digits below 0.0001 and from 1e16 on.
fn python_float(value: f64) -> String {
    if value == 0.0 || (1e-4..1e16).contains(&value.abs()) {
        return format!("{value:?}");
    }
    let text = format!("{value:e}");
    match text.split_once('e') {
        Some((digits, exponent)) => match exponent.strip_prefix('-') {
            Some(exponent) => format!("{digits}e-{exponent:0>2}"),
            None => format!("{digits}e+{exponent:0>2}"),
        },
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::python_float;

    #[test]
    fn numbers_are_written_as_python_writes_them() {
        for (value, expected) in [
            (0.15590165555477142, "0.15590165555477142"),
            (0.0, "0.0"),
            (2.0, "2.0"),
            (1e-4, "0.0001"),
            (0.00005, "5e-05"),
            (-1.5e-38, "-1.5e-38"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.25e30, "1.25e+30"),
        ] {
            assert_eq!(python_float(value), expected);
        }
    }
}
