//! GGML's element types and how their blocks become f32.
//!
//! Block layouts and arithmetic follow `ggml-quants.c` of llama.cpp and the Python package `gguf`, whose
//! results the tests hold to the bit.

use std::fmt;

use half::{bf16, f16};

/// An element type of GGUF that can be read here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types, missing_docs)]
pub enum GgmlType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
}

/// Type, id in the file, elements and bytes of a block.
const TYPES: [(GgmlType, u32, usize, usize); 11] = [
    (GgmlType::F32, 0, 1, 4),
    (GgmlType::F16, 1, 1, 2),
    (GgmlType::BF16, 30, 1, 2),
    (GgmlType::Q4_0, 2, 32, 18),
    (GgmlType::Q4_1, 3, 32, 20),
    (GgmlType::Q5_0, 6, 32, 22),
    (GgmlType::Q5_1, 7, 32, 24),
    (GgmlType::Q8_0, 8, 32, 34),
    (GgmlType::Q4_K, 12, 256, 144),
    (GgmlType::Q5_K, 13, 256, 176),
    (GgmlType::Q6_K, 14, 256, 210),
];

impl GgmlType {
    /// The type with this id in a GGUF file.
    pub fn from_id(id: u32) -> Option<GgmlType> {
        TYPES
            .iter()
            .find(|(_, known, ..)| *known == id)
            .map(|&(ggml, ..)| ggml)
    }

    /// Its id in a GGUF file.
    pub(super) fn id(self) -> u32 {
        let known = TYPES.iter().find(|(ggml, ..)| *ggml == self);
        known.map_or(u32::MAX, |&(_, id, ..)| id)
    }

    /// The names of all types that can be read.
    pub fn known() -> String {
        TYPES.map(|(ggml, ..)| ggml.to_string()).join(", ")
    }

    /// Elements of a block; rows hold whole blocks.
    pub fn block_len(self) -> usize {
        self.layout().0
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.layout().1
    }

    fn layout(self) -> (usize, usize) {
        TYPES
            .iter()
            .find(|(known, ..)| *known == self)
            .map_or((1, 1), |&(.., len, bytes)| (len, bytes))
    }

    /// Decodes whole blocks: `out` holds as many elements as `bytes` has.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            GgmlType::F32 => blocks(bytes, out, |b: &[u8; 4], out: &mut [f32; 1]| {
                *out = [f32::from_le_bytes(*b)]
            }),
            GgmlType::F16 => blocks(bytes, out, |b: &[u8; 2], out: &mut [f32; 1]| {
                *out = [f16::from_le_bytes(*b).to_f32()]
            }),
            GgmlType::BF16 => blocks(bytes, out, |b: &[u8; 2], out: &mut [f32; 1]| {
                *out = [bf16::from_le_bytes(*b).to_f32()]
            }),
            GgmlType::Q4_0 => blocks(bytes, out, q4_0),
            GgmlType::Q4_1 => blocks(bytes, out, q4_1),
            GgmlType::Q5_0 => blocks(bytes, out, q5_0),
            GgmlType::Q5_1 => blocks(bytes, out, q5_1),
            GgmlType::Q8_0 => blocks(bytes, out, q8_0),
            GgmlType::Q4_K => blocks(bytes, out, q4_k),
            GgmlType::Q5_K => blocks(bytes, out, q5_k),
            GgmlType::Q6_K => blocks(bytes, out, q6_k),
        }
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

fn blocks<const BYTES: usize, const LEN: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    for (block, out) in bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        decode(block, out);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Scale, then 16 bytes: element `i` in the low nibbles, element `16 + i` in the high ones.
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (i, &q) in block[2..].iter().enumerate() {
        out[i] = d * (i32::from(q & 15) - 8) as f32;
        out[i + 16] = d * (i32::from(q >> 4) - 8) as f32;
    }
}

/// Scale and minimum, then nibbles as in Q4_0.
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (i, &q) in block[4..].iter().enumerate() {
        out[i] = d * f32::from(q & 15) + m;
        out[i + 16] = d * f32::from(q >> 4) + m;
    }
}

/// Scale, 32 fifth bits, then nibbles as in Q4_0.
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    five_bits(&block[2..], |i, q| out[i] = d * (i32::from(q) - 16) as f32);
}

/// Scale and minimum, 32 fifth bits, then nibbles as in Q4_0.
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    five_bits(&block[4..], |i, q| out[i] = d * f32::from(q) + m);
}

fn five_bits(packed: &[u8], mut each: impl FnMut(usize, u8)) {
    let (high, low) = packed.split_at(4);
    let high = |i: usize| (high[i / 8] >> (i % 8) & 1) << 4;
    for (i, &q) in low.iter().enumerate() {
        each(i, q & 15 | high(i));
        each(i + 16, q >> 4 | high(i + 16));
    }
}

/// Scale, then signed bytes.
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (out, &q) in out.iter_mut().zip(&block[2..]) {
        *out = d * f32::from(q as i8);
    }
}

/// Six-bit scale and minimum of sub-block `i` of 8, from the 12 bytes that pack them.
fn scale_and_min(packed: &[u8], i: usize) -> (f32, f32) {
    let (scale, min) = if i < 4 {
        (packed[i] & 63, packed[i + 4] & 63)
    } else {
        (
            packed[i + 4] & 15 | packed[i - 4] >> 6 << 4,
            packed[i + 4] >> 4 | packed[i] >> 6 << 4,
        )
    };
    (f32::from(scale), f32::from(min))
}

/// Scale of the scales and of the minima, 12 bytes of both, then 4 runs of 32 bytes whose low nibbles are
/// one sub-block of 32 and whose high nibbles are the next.
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, qs) = block[4..].split_at(12);
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_and_min(scales, i);
        let (scale, min) = (d * scale, dmin * min);
        for (out, &q) in out.iter_mut().zip(&qs[i / 2 * 32..]) {
            *out = scale * f32::from(q >> (i % 2 * 4) & 15) - min;
        }
    }
}

/// As Q4_K, with 32 bytes of fifth bits before the nibbles: bit `i` belongs to sub-block `i`.
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, rest) = block[4..].split_at(12);
    let (high, qs) = rest.split_at(32);
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_and_min(scales, i);
        let (scale, min) = (d * scale, dmin * min);
        for ((out, &q), &h) in out.iter_mut().zip(&qs[i / 2 * 32..]).zip(high) {
            *out = scale * f32::from(q >> (i % 2 * 4) & 15 | (h >> i & 1) << 4) - min;
        }
    }
}

/// 128 bytes of low nibbles, 64 of two high bits, 16 signed scales of 16 elements each, the scale of the
/// scales. Each half of 128 elements takes 64 and 32 of those bytes.
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = half_at(block, 208);
    let (low, rest) = block.split_at(128);
    let (high, scales) = rest.split_at(64);
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let (half, quarter) = (i / 4, i % 4);
        let low = &low[half * 64 + quarter % 2 * 32..];
        let high = &high[half * 32..];
        for (j, out) in out.iter_mut().enumerate() {
            let q = low[j] >> (quarter / 2 * 4) & 15 | (high[j] >> (quarter * 2) & 3) << 4;
            let scale = f32::from(scales[i * 2 + j / 16] as i8);
            *out = d * scale * (i32::from(q) - 32) as f32;
        }
    }
}
