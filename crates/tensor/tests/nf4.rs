//! NF4: what bitsandbytes computed, to the bit; the rules again, one element at a time; and the operations on it.

use fuselora_tensor::nf4::{Absmax, NestedAbsmax, QUANT_MAP};
use fuselora_tensor::ops::lora_linear::{self, Backward, Dropout, Gradients, Lora, Projection};
use fuselora_tensor::ops::{dora, gather};
use fuselora_tensor::{DType, Device, Nf4Weight, Tensor, Weight, philox};
use proptest::prelude::*;
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};

/// Values of about a normal distribution, with some zeros.
fn values(seed: u64, count: usize) -> Vec<f32> {
    let word = |index: usize, part| {
        let key = [seed as u32, (seed >> 32) as u32];
        philox::philox4x32_10(key, [index as u32, part, 0, 0])
    };
    (0..count)
        .map(|index| {
            let words = word(index, 0);
            let sum: f32 = words.map(philox::uniform).iter().sum();
            if words[0] % 29 == 0 { 0.0 } else { sum - 2.0 }
        })
        .collect()
}

fn tensor(shape: [usize; 2], seed: u64) -> Tensor {
    Tensor::from_f32(&Device::cpu(), shape, &values(seed, shape[0] * shape[1])).unwrap()
}

/// The block size and shape of each case, and its file.
fn parity_cases() -> Vec<(PathBuf, serde_json::Value)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/parity/nf4");
    let Ok(index) = std::fs::read(folder.join("index.json")) else {
        println!("SKIPPED: {} is not there", folder.display());
        return Vec::new();
    };
    let index: Vec<serde_json::Value> = serde_json::from_slice(&index).unwrap();
    assert!(!index.is_empty());
    let case = |case: serde_json::Value| (folder.join(case["file"].as_str().unwrap()), case);
    index.into_iter().map(case).collect()
}

#[test]
fn agrees_with_bitsandbytes_to_the_bit() {
    for (path, case) in parity_cases() {
        let name = path.display().to_string();
        let file = std::fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&file).unwrap();
        let bytes = |tensor: &str| file.tensor(tensor).unwrap().data().to_vec();
        let size = |key: &str| case[key].as_u64().unwrap() as usize;
        let (shape, block_size) = ([size("rows"), size("columns")], size("blocksize"));
        let double = case["double_quantized"].as_bool().unwrap();
        let source = bytes("weight_source");
        let source = Tensor::from_bytes(&Device::cpu(), shape, DType::F32, &source).unwrap();
        let weight = Nf4Weight::quantize(&source, block_size, double).unwrap();
        assert_eq!(
            weight.packed().to_bytes().unwrap(),
            bytes("weight"),
            "{name}"
        );
        match weight.absmax() {
            Absmax::Plain(absmax) => {
                assert!(!double);
                assert_eq!(absmax.to_bytes().unwrap(), bytes("weight.absmax"), "{name}");
            }
            Absmax::Nested(nested) => {
                let NestedAbsmax {
                    absmax,
                    quant_map,
                    nested_absmax,
                    offset,
                } = &**nested;
                let expected = |tensor: &Tensor, of: &str| {
                    assert_eq!(tensor.to_bytes().unwrap(), bytes(of), "{name}: {of}");
                };
                expected(absmax, "weight.absmax");
                expected(quant_map, "weight.nested_quant_map");
                expected(nested_absmax, "weight.nested_absmax");
                let state = bytes("weight.quant_state.bitsandbytes__nf4");
                let state: serde_json::Value = serde_json::from_slice(&state).unwrap();
                let stored = state["nested_offset"].as_f64().unwrap();
                assert_eq!(f64::from(*offset), stored, "{name}");
            }
        }
        assert_eq!(
            bytemuck::cast_slice::<f32, u8>(&QUANT_MAP),
            bytes("weight.quant_map")
        );
        let rounded = source.cast(DType::BF16).unwrap();
        let from_bf16 = Nf4Weight::quantize(&rounded, block_size, double).unwrap();
        let packed = from_bf16.packed().to_bytes().unwrap();
        assert_eq!(packed, bytes("weight_from_bf16"), "{name}");
        for (weight, dtype, of) in [
            (weight, DType::F32, "dequantized_f32"),
            (from_bf16, DType::BF16, "dequantized_bf16"),
        ] {
            let found = weight.dequantize(dtype).unwrap();
            // The library's code for AVX-512 takes the blocks of each row to begin at its first element, counted as if
            // rows held whole blocks: what it stored there is not what it was given. Quantization, its generic code
            // and its other devices count blocks through all elements.
            let columns = shape[1];
            let found = if columns.is_multiple_of(16) && !columns.is_multiple_of(block_size) {
                let (codes, scales) = (codes(&weight), scales(&weight));
                let misread = codes.iter().enumerate().map(|(i, &code)| {
                    let (row, column) = (i / columns, i % columns);
                    let block = row * (columns / block_size) + column / block_size;
                    QUANT_MAP[code as usize] * scales[block]
                });
                let misread: Vec<f32> = misread.collect();
                let misread = Tensor::from_f32(&Device::cpu(), shape, &misread).unwrap();
                misread.cast(dtype).unwrap()
            } else {
                found
            };
            assert!(found.to_bytes().unwrap() == bytes(of), "{name}: {of}");
        }
    }
}

/// The codes of a weight, one an element.
fn codes(weight: &Nf4Weight) -> Vec<u8> {
    let packed = weight.packed().to_bytes().unwrap();
    let codes = packed.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    codes.take(weight.shape().iter().product()).collect()
}

/// What each block of a weight is multiplied by.
fn scales(weight: &Nf4Weight) -> Vec<f32> {
    match weight.absmax() {
        Absmax::Plain(absmax) => absmax.to_f32_vec().unwrap(),
        Absmax::Nested(nested) => {
            let NestedAbsmax {
                absmax,
                quant_map,
                nested_absmax,
                offset,
            } = &**nested;
            let map = quant_map.to_f32_vec().unwrap();
            let nested_absmax = nested_absmax.to_f32_vec().unwrap();
            let codes = absmax.to_bytes().unwrap().into_iter().enumerate();
            codes
                .map(|(block, code)| {
                    let product = map[code as usize] * nested_absmax[block / 256];
                    product + offset
                })
                .collect()
        }
    }
}

/// Codes and absmax by the rules of docs/quantization.md, one element at a time.
fn reference(values: &[f32], block_size: usize) -> (Vec<u8>, Vec<f32>) {
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for block in values.chunks(block_size) {
        let absmax = block.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let whole = block.len() == block_size;
        let bounded = if absmax < 1e-38 { 1e-38 } else { absmax };
        scales.push(if whole { absmax } else { bounded });
        for x in block {
            let x = if whole {
                x * (1.0 / bounded)
            } else {
                x / bounded
            };
            let distance = |code: &u8| (f64::from(x) - f64::from(QUANT_MAP[*code as usize])).abs();
            let nearest = (0..16u8).min_by(|a, b| distance(a).total_cmp(&distance(b)));
            codes.push(nearest.unwrap());
        }
    }
    (codes, scales)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn quantizes_and_dequantizes_by_the_rules(
        rows in 1usize..20, columns in 1usize..300, log2 in 5u32..13, seed: u64, double: bool,
        exponent in -39i32..30, dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]),
    ) {
        let (count, block_size) = (rows * columns, 1 << log2);
        let scale = 10f32.powi(if dtype == DType::F16 { exponent.clamp(-4, 4) } else { exponent });
        let source: Vec<f32> = values(seed, count).iter().map(|x| x * scale).collect();
        let source = Tensor::from_f32(&Device::cpu(), [rows, columns], &source).unwrap();
        let source = source.cast(dtype).unwrap();
        let weight = Nf4Weight::quantize(&source, block_size, double).unwrap();

        let (codes, scales) = reference(&source.to_f32_vec().unwrap(), block_size);
        let packed = weight.packed().to_bytes().unwrap();
        prop_assert_eq!(packed.len(), count.div_ceil(2));
        prop_assert_eq!(self::codes(&weight), codes.clone());
        if count % 2 == 1 {
            prop_assert_eq!(packed[count / 2] & 15, 7);
        }
        let stored = self::scales(&weight);
        match weight.absmax() {
            Absmax::Plain(_) => {
                prop_assert!(!double);
                prop_assert_eq!(&stored, &scales);
            }
            Absmax::Nested(nested) => {
                prop_assert!(double);
                let nested = nested.nested_absmax.to_f32_vec().unwrap();
                // The map's steps are 0.0141 of the largest at most; its lowest value is -0.993. A largest whose f32
                // reciprocal is infinite, by which the rule multiplies, leaves no more than the sign.
                for (block, (found, exact)) in stored.iter().zip(&scales).enumerate() {
                    if (1.0 / nested[block / 256]).is_infinite() {
                        continue;
                    }
                    let bound = 0.0072 * nested[block / 256] + 1e-6 * exact.abs() + 1e-44;
                    prop_assert!((found - exact).abs() <= bound, "block {}: {} for {}", block, found, exact);
                }
            }
        }
        for out in [DType::F32, DType::F16, DType::BF16] {
            let found = weight.dequantize(out).unwrap().to_f32_vec().unwrap();
            let expected: Vec<f32> = codes.iter().enumerate()
                .map(|(i, &code)| QUANT_MAP[code as usize] * stored[i / block_size]).collect();
            let expected = Tensor::from_f32(&Device::cpu(), [count], &expected).unwrap();
            let expected = expected.cast(out).unwrap().to_f32_vec().unwrap();
            prop_assert_eq!(found, expected);
        }
        // Any rows, wherever in a block or a byte they begin.
        let weight = Weight::from(weight);
        let all = weight.to_f32_vec().unwrap();
        for row in 0..rows {
            let mut found = vec![f32::NAN; columns];
            weight.rows_f32(row..row + 1, &mut found).unwrap();
            prop_assert_eq!(&found[..], &all[row * columns..][..columns]);
        }
    }

    #[test]
    fn lora_linear_agrees_with_the_dequantized_weight(
        tokens in 1usize..40, in_features in 1usize..150, out in prop::array::uniform2(1usize..150),
        rank in 1usize..9, seed: u64, double: bool, dropout: bool,
    ) {
        let device = Device::cpu();
        let x = tensor([tokens, in_features], seed);
        let step = Tensor::from_u32(&device, [1], &[5]).unwrap();
        let mut relative = Vec::new();
        let both = [false, true].map(|dense| {
            let layers: Vec<_> = out.iter().zip(1u64..).map(|(&out, part)| {
                let weight = tensor([out, in_features], seed ^ part);
                let weight = Nf4Weight::quantize(&weight, 64, double).unwrap();
                let weight = match dense {
                    true => Weight::Dense(weight.dequantize(DType::F32).unwrap()),
                    false => Weight::from(weight),
                };
                let bias = Tensor::from_f32(&device, [out], &values(seed ^ (part << 8), out)).unwrap();
                (weight, bias, tensor([rank, in_features], seed ^ (part << 16)), tensor([out, rank], seed ^ (part << 24)))
            }).collect();
            let projections: Vec<_> = layers.iter().map(|(weight, bias, a, b)| Projection {
                weight,
                bias: Some(bias),
                lora: Some(Lora {
                    a,
                    b,
                    scaling: 0.5,
                    dropout: dropout.then_some(Dropout { probability: 0.25, seed, stream: 3, step: &step }),
                }),
            }).collect();
            let outputs = lora_linear::forward(&x, &projections).unwrap();
            let mut results: Vec<Vec<f32>> = outputs.iter().map(|output| output.y.to_f32_vec().unwrap()).collect();
            let dys: Vec<_> = out.iter().map(|&out| tensor([tokens, out], seed ^ 77)).collect();
            let mut gradients: Vec<_> = out.iter().map(|&out| (
                Tensor::zeros(&device, [rank, in_features], DType::F32).unwrap(),
                Tensor::zeros(&device, [out, rank], DType::F32).unwrap(),
            )).collect();
            let items = projections.iter().zip(&outputs).zip(&dys).zip(&mut gradients);
            let items = items.map(|(((&projection, output), dy), (a, b))| Backward {
                projection,
                dy,
                h: output.h.as_ref(),
                gradients: Some(Gradients { a, b }),
            }).collect();
            results.push(lora_linear::backward(&x, items, true).unwrap().unwrap().to_f32_vec().unwrap());
            for ((weight, _, a, b), (da, db)) in layers.iter().zip(&gradients) {
                results.extend([da, db].map(|gradient| gradient.to_f32_vec().unwrap()));
                results.push(lora_linear::merge(weight, a, b, 0.5).unwrap().to_f32_vec().unwrap());
                results.push(dora::weight_norm(weight, a, b, 0.5).unwrap().to_f32_vec().unwrap());
                let ids = Tensor::from_u32(&device, [2], &[0, weight.out_features() as u32 - 1]).unwrap();
                results.push(gather::forward(weight, &ids).unwrap().to_f32_vec().unwrap());
            }
            results
        });
        for (found, expected) in both[0].iter().zip(&both[1]) {
            let largest = expected.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
            relative.extend(found.iter().zip(expected).map(|(f, e)| (f - e).abs() / largest));
        }
        prop_assert!(relative.iter().all(|&error| error <= 1e-5), "{:?}", relative.iter().cloned().fold(0.0, f32::max));
    }
}

#[test]
fn ties_go_to_the_lower_code() {
    let mut source = [1.0; 32];
    for (x, pair) in source[1..].iter_mut().zip(QUANT_MAP.windows(2)) {
        *x = (pair[0] + pair[1]) / 2.0;
    }
    let source = Tensor::from_f32(&Device::cpu(), [1, 32], &source).unwrap();
    let weight = Nf4Weight::quantize(&source, 32, false).unwrap();
    assert_eq!(codes(&weight)[1..16], Vec::from_iter(0..15));
}

#[test]
fn refusals_name_the_part() {
    let device = Device::cpu();
    let bytes = |len: usize| Tensor::zeros(&device, [len], DType::U8).unwrap();
    let floats = |len: usize| Tensor::zeros(&device, [len], DType::F32).unwrap();
    let plain = |absmax| Absmax::Plain(absmax);
    let nested = |codes, map, absmax| {
        Absmax::Nested(Box::new(NestedAbsmax {
            absmax: bytes(codes),
            quant_map: floats(map),
            nested_absmax: floats(absmax),
            offset: 0.0,
        }))
    };
    let new = |block_size, packed, absmax| Nf4Weight::new([6, 65], block_size, packed, absmax);
    assert!(new(64, bytes(195), plain(floats(7))).is_ok());
    assert!(new(64, bytes(195), nested(7, 256, 1)).is_ok());
    let cases = [
        (
            new(48, bytes(195), plain(floats(9))),
            "block_size: 48 is not",
        ),
        (
            new(8192, bytes(195), plain(floats(1))),
            "block_size: 8192 is not",
        ),
        (
            new(64, bytes(194), plain(floats(7))),
            "packed: expected shape [195]",
        ),
        (
            new(64, floats(195), plain(floats(7))),
            "packed: expected data type u8",
        ),
        (
            new(64, bytes(195), plain(floats(6))),
            "absmax: expected shape [7]",
        ),
        (
            new(64, bytes(195), plain(bytes(7))),
            "absmax: expected data type f32",
        ),
        (
            new(64, bytes(195), nested(8, 256, 1)),
            "absmax: expected shape [7]",
        ),
        (
            new(64, bytes(195), nested(7, 255, 1)),
            "nested_quant_map: expected shape [256]",
        ),
        (
            new(64, bytes(195), nested(7, 256, 2)),
            "nested_absmax: expected shape [1]",
        ),
    ];
    for (found, expected) in cases {
        let error = found.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let mut source = values(1, 64 * 40);
    source[64 * 33 + 5] = f32::NAN;
    let source = Tensor::from_f32(&device, [40, 64], &source).unwrap();
    let error = Nf4Weight::quantize(&source, 64, true)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("weight: an element in row 33 is not finite"),
        "{error}"
    );
}
