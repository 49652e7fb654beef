//! Numbers as the user writes and reads them, and as the device keeps them.

use half::{bf16, f16};

#[derive(Clone, Copy)]
enum Kind {
    Signed,
    Unsigned,
    Float,
    BrainFloat,
}

/// A type of number.
#[derive(Clone, Copy)]
pub struct Number {
    pub name: &'static str,
    kind: Kind,
    pub bytes: usize,
}

const fn number(name: &'static str, kind: Kind, bytes: usize) -> Number {
    Number { name, kind, bytes }
}

const NUMBERS: [Number; 12] = [
    number("i8", Kind::Signed, 1),
    number("i16", Kind::Signed, 2),
    number("i32", Kind::Signed, 4),
    number("i64", Kind::Signed, 8),
    number("u8", Kind::Unsigned, 1),
    number("u16", Kind::Unsigned, 2),
    number("u32", Kind::Unsigned, 4),
    number("u64", Kind::Unsigned, 8),
    number("f16", Kind::Float, 2),
    number("f32", Kind::Float, 4),
    number("f64", Kind::Float, 8),
    number("bf16", Kind::BrainFloat, 2),
];

impl Number {
    pub fn named(name: &str) -> Result<Number, String> {
        let found = NUMBERS.into_iter().find(|number| number.name == name);
        found.ok_or_else(|| {
            let names = NUMBERS.map(|number| number.name).join(", ");
            format!("there is no type {name}: {names} are")
        })
    }

    /// The number in the device's bytes.
    pub fn encode(self, text: &str) -> Result<Vec<u8>, String> {
        self.bytes_of(text)
            .ok_or_else(|| format!("{text} is not a number that {} can hold", self.name))
    }

    fn bytes_of(self, text: &str) -> Option<Vec<u8>> {
        match self.kind {
            Kind::Signed | Kind::Unsigned => {
                let value: i128 = match text.strip_prefix("0x") {
                    Some(digits) => i128::from_str_radix(digits, 16).ok()?,
                    None => text.parse().ok()?,
                };
                let bits = 8 * self.bytes as u32;
                let range = match self.kind {
                    Kind::Signed => -(1i128 << (bits - 1))..1i128 << (bits - 1),
                    _ => 0..1i128 << bits,
                };
                let fits = range.contains(&value);
                fits.then(|| value.to_le_bytes()[..self.bytes].to_vec())
            }
            Kind::Float => Some(match self.bytes {
                2 => f16::from_f64(text.parse().ok()?).to_le_bytes().to_vec(),
                4 => text.parse::<f32>().ok()?.to_le_bytes().to_vec(),
                _ => text.parse::<f64>().ok()?.to_le_bytes().to_vec(),
            }),
            Kind::BrainFloat => {
                let value = bf16::from_f64(text.parse().ok()?);
                Some(value.to_le_bytes().to_vec())
            }
        }
    }

    /// The number that `bytes`, as many as it has, stand for.
    pub fn decode(self, bytes: &[u8]) -> String {
        let bits = bytes
            .iter()
            .rev()
            .fold(0u64, |bits, &byte| bits << 8 | u64::from(byte));
        match (self.kind, self.bytes) {
            (Kind::Signed, bytes) => {
                let unused = 64 - 8 * bytes as u32;
                ((bits << unused) as i64 >> unused).to_string()
            }
            (Kind::Unsigned, _) => bits.to_string(),
            (Kind::Float, 2) => f16::from_bits(bits as u16).to_string(),
            (Kind::Float, 4) => f32::from_bits(bits as u32).to_string(),
            (Kind::Float, _) => f64::from_bits(bits).to_string(),
            (Kind::BrainFloat, _) => bf16::from_bits(bits as u16).to_string(),
        }
    }
}
