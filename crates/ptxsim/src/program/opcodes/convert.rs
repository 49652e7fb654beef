//! 9.7.9.21 `cvt`.

use half::{bf16, f16};

use super::*;
use crate::arith::convert::{self, Narrowing};
use crate::arith::float::{Clamp, Mode};
use crate::arith::{Format, Rounding};

const INTEGER_ROUNDINGS: [(&str, Rounding); 4] = [
    ("rni", Rounding::NearestEven),
    ("rzi", Rounding::Zero),
    ("rmi", Rounding::Down),
    ("rpi", Rounding::Up),
];

fn narrowing(o: &Operands) -> Narrowing {
    Narrowing {
        rounding: o.mode.rounding,
        relu: o.mode.clamp == Clamp::Relu,
        satfinite: o.immediate != 0,
    }
}

fn relu(o: &Operands) -> bool {
    o.mode.clamp == Clamp::Relu
}

/// `$body` with `$S` and `$D` standing for the types of a conversion.
macro_rules! for_source {
    ($ty:expr, $S:ident => $body:expr, $($name:ident $rust:ty),*) => {
        match $ty {
            $(Type::$name => {
                type $S = $rust;
                $body
            })*
            _ => None,
        }
    };
}

fn integers(d: Type, s: Type) -> Option<RowFn> {
    for_source!(s, S => for_source!(d, D => {
        Some(row!(1, |a: S, o| -> D { convert::int_to_int(a, o.immediate != 0) }))
    }, U8 u8, S8 i8, U16 u16, S16 i16, U32 u32, S32 i32, U64 u64, S64 i64),
        U8 u8, S8 i8, U16 u16, S16 i16, U32 u32, S32 i32, U64 u64, S64 i64)
}

fn floats(d: Type, s: Type) -> Option<RowFn> {
    for_source!(s, S => for_source!(d, D => {
        Some(row!(1, |a: S, o| -> D { convert::float_to_float(a, o.mode) }))
    }, F16 f16, Bf16 bf16, F32 f32, F64 f64), F16 f16, Bf16 bf16, F32 f32, F64 f64)
}

fn to_integer(d: Type, s: Type) -> Option<RowFn> {
    for_source!(s, S => for_source!(d, D => {
        Some(row!(1, |a: S, o| -> D { convert::float_to_int(a, o.mode) }))
    }, U8 u8, S8 i8, U16 u16, S16 i16, U32 u32, S32 i32, U64 u64, S64 i64),
        F16 f16, Bf16 bf16, F32 f32, F64 f64)
}

fn from_integer(d: Type, s: Type) -> Option<RowFn> {
    for_source!(s, S => for_source!(d, D => {
        Some(row!(1, |a: S, o| -> D { convert::int_to_float(a, o.mode) }))
    }, F16 f16, Bf16 bf16, F32 f32, F64 f64),
        U8 u8, S8 i8, U16 u16, S16 i16, U32 u32, S32 i32, U64 u64, S64 i64)
}

fn integral(d: Type) -> Option<RowFn> {
    for_float!(d, T => row!(1, |a: T, o| convert::float_to_integral(a, o.mode)))
}

/// Conversions of two f32 values to a packed pair: `a` becomes the upper half.
fn packed(d: Type) -> Option<RowFn> {
    Some(match d {
        Type::F16x2 => row!(2, |a: f32, b: f32, o| -> [f16; 2] {
            [b, a].map(|x| convert::f32_to_half(x, narrowing(o)))
        }),
        Type::Bf16x2 => row!(2, |a: f32, b: f32, o| -> [bf16; 2] {
            [b, a].map(|x| convert::f32_to_half(x, narrowing(o)))
        }),
        Type::E4m3x2 => row!(2, |a: f32, b: f32, o| {
            u16::from_le_bytes([b, a].map(|x| convert::to_f8(x, Format::E4M3, relu(o))))
        }),
        Type::E5m2x2 => row!(2, |a: f32, b: f32, o| {
            u16::from_le_bytes([b, a].map(|x| convert::to_f8(x, Format::E5M2, relu(o))))
        }),
        _ => return None,
    })
}

/// Conversions between a packed pair of f16 and a packed pair of 8-bit floats.
fn repacked(d: Type, s: Type) -> Option<RowFn> {
    Some(match (d, s) {
        (Type::F16x2, Type::E4m3x2) => row!(1, |a: u16, o| -> [f16; 2] {
            a.to_le_bytes()
                .map(|x| convert::from_f8(x, Format::E4M3, relu(o)))
        }),
        (Type::F16x2, Type::E5m2x2) => row!(1, |a: u16, o| -> [f16; 2] {
            a.to_le_bytes()
                .map(|x| convert::from_f8(x, Format::E5M2, relu(o)))
        }),
        (Type::E4m3x2, Type::F16x2) => row!(1, |a: [f16; 2], o| {
            u16::from_le_bytes(a.map(|x| convert::to_f8(x, Format::E4M3, relu(o))))
        }),
        (Type::E5m2x2, Type::F16x2) => row!(1, |a: [f16; 2], o| {
            u16::from_le_bytes(a.map(|x| convert::to_f8(x, Format::E5M2, relu(o))))
        }),
        _ => return None,
    })
}

pub(super) fn decode(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let integer_rounding = line.choice(&INTEGER_ROUNDINGS);
    let away = line.flag("rna").then_some(Rounding::NearestAway);
    let rounding = integer_rounding
        .or_else(|| line.choice(&float::ROUNDINGS))
        .or(away);
    let rounding = rounding.unwrap_or(Rounding::NearestEven);
    let satfinite = line.flag("satfinite");
    let ftz = line.flag("ftz");
    let saturate = line.flag("sat");
    let clamp = match (saturate, line.flag("relu")) {
        (true, _) => Clamp::Saturate,
        (_, true) => Clamp::Relu,
        _ => Clamp::None,
    };
    let mode = Mode {
        rounding,
        ftz,
        clamp,
    };
    let (d, s) = (line.ty()?, line.ty()?);
    let d_int = d.is_integer();
    let s_int = s.is_integer();
    let (row, flags) = match (d, s) {
        (Type::F16x2 | Type::Bf16x2 | Type::E4m3x2 | Type::E5m2x2, Type::F32) => {
            (packed(d), satfinite)
        }
        (Type::F16x2 | Type::E4m3x2 | Type::E5m2x2, _) => (repacked(d, s), satfinite),
        (Type::Tf32, Type::F32) => (
            Some(row!(1, |a: f32, o| convert::f32_to_tf32(a, narrowing(o)))),
            satfinite,
        ),
        (Type::F16, Type::F32) if !saturate && !ftz => (
            Some(row!(1, |a: f32, o| -> f16 {
                convert::f32_to_half(a, narrowing(o))
            })),
            satfinite,
        ),
        (Type::Bf16, Type::F32) if !saturate && !ftz => (
            Some(row!(1, |a: f32, o| -> bf16 {
                convert::f32_to_half(a, narrowing(o))
            })),
            satfinite,
        ),
        _ if d_int && s_int => (integers(d, s), saturate),
        _ if d_int => (to_integer(d, s), saturate),
        _ if s_int => (from_integer(d, s), saturate),
        _ if integer_rounding.is_some() && d == s => (integral(d), saturate),
        _ => (floats(d, s), saturate),
    };
    let row = row.ok_or_else(|| line.unsupported())?;
    let two = line.operand_count() == 3;
    let mut operands = Operands {
        mode,
        immediate: flags.into(),
        ..Operands::default()
    };
    if two {
        operands.a = line.src(1, s)?;
        operands.b = line.src(2, s)?;
    } else {
        // A source register may be wider than its type: the low bits are read.
        let operand = line.operand(1)?;
        let (value, bits) = match line.any_value(1, operand, s)? {
            Reg::Word(slot, bits) => (slot, u32::from(bits)),
            Reg::Wide(slot) => (slot, 64),
            _ => return Err(line.error("`cvt` converts numbers")),
        };
        operands.a = value;
        if bits < s.bits() {
            return Err(line.error("the source register is narrower than its type"));
        }
        if bits == 64 && s.bits() < 64 {
            operands.a = line.decoder.new_word();
            let low = Operands {
                d: operands.a,
                a: value,
                ..Operands::default()
            };
            line.step(row!(1, |a: u64, _| a as u32), low);
        }
    }
    let class = if d_int && s_int {
        Class::Integer
    } else {
        Class::Float
    };
    // A destination register may be wider than its type: the value is extended.
    let (slot, bits) = match line.any_d(0)? {
        Reg::Word(slot, bits) => (slot, u32::from(bits)),
        Reg::Wide(slot) => (slot, 64),
        _ => return Err(line.error("`cvt` writes a register")),
    };
    if bits == d.bits() || d.bits() == 8 && !d.is_signed() && bits < 64 {
        return line.alu(
            row,
            Operands {
                d: slot,
                ..operands
            },
            class,
            0,
        );
    }
    let extend = match (d, bits) {
        (Type::S8, 16) => row!(1, |a: i8, _| i16::from(a)),
        (Type::S8, 32) => row!(1, |a: i8, _| i32::from(a)),
        (Type::S8, 64) => row!(1, |a: i8, _| i64::from(a)),
        (Type::S16, 32) => row!(1, |a: i16, _| i32::from(a)),
        (Type::S16, 64) => row!(1, |a: i16, _| i64::from(a)),
        (Type::S32, 64) => row!(1, |a: i32, _| i64::from(a)),
        (Type::U8 | Type::U16, 32) => row!(1, |a: u32, _| a),
        (Type::U8 | Type::U16 | Type::U32, 64) => row!(1, |a: u32, _| u64::from(a)),
        _ => return Err(line.error("the destination register does not fit its type")),
    };
    let between = line.decoder.new_word();
    line.step(
        row,
        Operands {
            d: between,
            ..operands
        },
    );
    line.alu(
        extend,
        Operands {
            d: slot,
            a: between,
            ..Operands::default()
        },
        class,
        0,
    )
}
