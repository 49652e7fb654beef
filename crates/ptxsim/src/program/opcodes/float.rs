//! 9.7.3 floating point and 9.7.4 half precision.

use half::{bf16, f16};

use super::*;
use crate::arith::compare::Property;
use crate::arith::float::{self, Clamp, Extremum, Mode};
use crate::arith::{Rounding, approx, compare};

/// The roundings of arithmetic.
pub(super) const ROUNDINGS: [(&str, Rounding); 4] = [
    ("rn", Rounding::NearestEven),
    ("rz", Rounding::Zero),
    ("rm", Rounding::Down),
    ("rp", Rounding::Up),
];

/// Applies `$f` to a float type or to both halves of a packed one.
macro_rules! float_rows {
    ($ty:expr, 1, $f:expr) => {
        match $ty {
            Type::F16x2 => Some(row!(1, |a: [f16; 2], o| a.map(|a| $f(a, o)))),
            Type::Bf16x2 => Some(row!(1, |a: [bf16; 2], o| a.map(|a| $f(a, o)))),
            ty => for_float!(ty, T => row!(1, |a: T, o| $f(a, o))),
        }
    };
    ($ty:expr, 2, $f:expr) => {
        match $ty {
            Type::F16x2 => Some(row!(2, |a: [f16; 2], b: [f16; 2], o| {
                [$f(a[0], b[0], o), $f(a[1], b[1], o)]
            })),
            Type::Bf16x2 => Some(row!(2, |a: [bf16; 2], b: [bf16; 2], o| {
                [$f(a[0], b[0], o), $f(a[1], b[1], o)]
            })),
            ty => for_float!(ty, T => row!(2, |a: T, b: T, o| $f(a, b, o))),
        }
    };
    ($ty:expr, 3, $f:expr) => {
        match $ty {
            Type::F16x2 => Some(row!(3, |a: [f16; 2], b: [f16; 2], c: [f16; 2], o| {
                [$f(a[0], b[0], c[0], o), $f(a[1], b[1], c[1], o)]
            })),
            Type::Bf16x2 => Some(row!(3, |a: [bf16; 2], b: [bf16; 2], c: [bf16; 2], o| {
                [$f(a[0], b[0], c[0], o), $f(a[1], b[1], c[1], o)]
            })),
            ty => for_float!(ty, T => row!(3, |a: T, b: T, c: T, o| $f(a, b, c, o))),
        }
    };
}

pub(super) fn decode(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let approx = line.flag("approx");
    let full = line.flag("full");
    let rounding = line.choice(&ROUNDINGS).unwrap_or(Rounding::NearestEven);
    let ftz = line.flag("ftz");
    let clamp = match (line.flag("sat"), line.flag("relu")) {
        (true, _) => Clamp::Saturate,
        (_, true) => Clamp::Relu,
        _ => Clamp::None,
    };
    let mode = Mode {
        rounding,
        ftz,
        clamp,
    };
    match line.opcode() {
        "min" | "max" => return extremum(line, ftz),
        "testp" => return property(line),
        _ => {}
    }
    let ty = line.ty()?;
    let plain = mode == Mode::RN && ty == Type::F32;
    let (row, sources) = match line.opcode() {
        // The plain f32 forms are nearly all that runs: their mode is known to the compiler.
        "add" if plain => (
            Some(row!(2, |a: f32, b: f32, _| float::add(a, b, Mode::RN))),
            2,
        ),
        "sub" if plain => (
            Some(row!(2, |a: f32, b: f32, _| float::sub(a, b, Mode::RN))),
            2,
        ),
        "mul" if plain => (
            Some(row!(2, |a: f32, b: f32, _| float::mul(a, b, Mode::RN))),
            2,
        ),
        "fma" | "mad" if plain => (
            Some(row!(3, |a: f32, b: f32, c: f32, _| float::fma(
                a,
                b,
                c,
                Mode::RN
            ))),
            3,
        ),
        "add" => (
            float_rows!(ty, 2, |a, b, o: &Operands| float::add(a, b, o.mode)),
            2,
        ),
        "sub" => (
            float_rows!(ty, 2, |a, b, o: &Operands| float::sub(a, b, o.mode)),
            2,
        ),
        "mul" => (
            float_rows!(ty, 2, |a, b, o: &Operands| float::mul(a, b, o.mode)),
            2,
        ),
        "fma" | "mad" => (
            float_rows!(ty, 3, |a, b, c, o: &Operands| float::fma(a, b, c, o.mode)),
            3,
        ),
        "neg" if ftz => (
            float_rows!(ty, 1, |a, _: &Operands| float::neg(float::flush(a))),
            1,
        ),
        "neg" => (float_rows!(ty, 1, |a, _: &Operands| float::neg(a)), 1),
        "abs" if ftz => (
            float_rows!(ty, 1, |a, _: &Operands| float::abs(float::flush(a))),
            1,
        ),
        "abs" => (float_rows!(ty, 1, |a, _: &Operands| float::abs(a)), 1),
        "copysign" => (
            float_rows!(ty, 2, |a, b, _: &Operands| float::copysign(a, b)),
            2,
        ),
        "div" => (divide(ty, approx, full), 2),
        _ => (special(line.opcode(), ty, approx), 1),
    };
    let row = row.ok_or_else(|| line.unsupported())?;
    let flops = match line.opcode() {
        "fma" | "mad" => 2,
        "neg" | "abs" | "copysign" => 0,
        _ => 1,
    };
    let operands = Operands {
        mode,
        ..line.operands(ty, &[ty; 3][..sources])?
    };
    line.alu(row, operands, Class::Float, flops * ty.packed())
}

fn divide(ty: Type, approx: bool, full: bool) -> Option<RowFn> {
    Some(match ty {
        Type::F32 if approx => row!(2, |a: f32, b: f32, o| approx::div_approx(a, b, o.mode.ftz)),
        Type::F32 if full => row!(2, |a: f32, b: f32, o| approx::div_full(a, b, o.mode.ftz)),
        Type::F32 => row!(2, |a: f32, b: f32, o| float::div(a, b, o.mode)),
        Type::F64 => row!(2, |a: f64, b: f64, o| float::div(a, b, o.mode)),
        _ => return None,
    })
}

/// `rcp`, `sqrt`, `rsqrt`, `sin`, `cos`, `lg2`, `ex2`, `tanh`.
fn special(opcode: &str, ty: Type, approx: bool) -> Option<RowFn> {
    Some(match (opcode, ty, approx) {
        ("rcp", Type::F32, true) => row!(1, |a: f32, o| approx::rcp(a, o.mode.ftz)),
        ("rcp", Type::F32, false) => row!(1, |a: f32, o| float::rcp(a, o.mode)),
        ("rcp", Type::F64, true) => row!(1, |a: f64, _| approx::rcp_f64(a)),
        ("rcp", Type::F64, false) => row!(1, |a: f64, o| float::rcp(a, o.mode)),
        ("sqrt", Type::F32, true) => row!(1, |a: f32, o| approx::sqrt(a, o.mode.ftz)),
        ("sqrt", Type::F32, false) => row!(1, |a: f32, o| float::sqrt(a, o.mode)),
        ("sqrt", Type::F64, false) => row!(1, |a: f64, o| float::sqrt(a, o.mode)),
        ("rsqrt", Type::F32, true) => row!(1, |a: f32, o| approx::rsqrt(a, o.mode.ftz)),
        ("rsqrt", Type::F64, true) => row!(1, |a: f64, o| approx::rsqrt_f64(a, o.mode.ftz)),
        ("sin", Type::F32, true) => row!(1, |a: f32, o| approx::sin(a, o.mode.ftz)),
        ("cos", Type::F32, true) => row!(1, |a: f32, o| approx::cos(a, o.mode.ftz)),
        ("lg2", Type::F32, true) => row!(1, |a: f32, o| approx::lg2(a, o.mode.ftz)),
        ("ex2", Type::F32, true) => row!(1, |a: f32, o| approx::ex2(a, o.mode.ftz)),
        ("ex2", Type::F16, true) => row!(1, |a: f16, o| approx::ex2(a, o.mode.ftz)),
        ("ex2", Type::Bf16, true) => row!(1, |a: bf16, o| approx::ex2(a, o.mode.ftz)),
        ("ex2", Type::F16x2, true) => {
            row!(1, |a: [f16; 2], o| a.map(|a| approx::ex2(a, o.mode.ftz)))
        }
        ("ex2", Type::Bf16x2, true) => {
            row!(1, |a: [bf16; 2], o| a.map(|a| approx::ex2(a, o.mode.ftz)))
        }
        ("tanh", Type::F32, true) => row!(1, |a: f32, _| approx::tanh(a)),
        ("tanh", Type::F16, true) => row!(1, |a: f16, _| approx::tanh(a)),
        ("tanh", Type::Bf16, true) => row!(1, |a: bf16, _| approx::tanh(a)),
        ("tanh", Type::F16x2, true) => row!(1, |a: [f16; 2], _| a.map(approx::tanh)),
        ("tanh", Type::Bf16x2, true) => row!(1, |a: [bf16; 2], _| a.map(approx::tanh)),
        _ => return None,
    })
}

const FTZ: u32 = 1;
const NAN: u32 = 2;
const XORSIGN_ABS: u32 = 4;

fn extremum_of(operands: &Operands) -> Extremum {
    let flag = |bit| operands.immediate & bit != 0;
    Extremum {
        ftz: flag(FTZ),
        nan: flag(NAN),
        xorsign_abs: flag(XORSIGN_ABS),
    }
}

fn extremum(line: &mut Line<'_, '_, '_>, ftz: bool) -> Decoded<()> {
    let nan = line.flag("NaN");
    let xorsign = line.flag("xorsign");
    if xorsign && !line.flag("abs") {
        return Err(line.unsupported());
    }
    let ty = line.ty()?;
    let row = if line.opcode() == "min" {
        float_rows!(ty, 2, |a, b, o: &Operands| float::min(a, b, extremum_of(o)))
    } else {
        float_rows!(ty, 2, |a, b, o: &Operands| float::max(a, b, extremum_of(o)))
    };
    let row = row.ok_or_else(|| line.unsupported())?;
    let flag = |set, bit| if set { bit } else { 0 };
    let immediate = flag(ftz, FTZ) | flag(nan, NAN) | flag(xorsign, XORSIGN_ABS);
    let operands = Operands {
        immediate,
        ..line.operands(ty, &[ty, ty])?
    };
    line.alu(row, operands, Class::Float, ty.packed())
}

fn property(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    const PROPERTIES: [(&str, Property); 6] = [
        ("finite", Property::Finite),
        ("infinite", Property::Infinite),
        ("number", Property::Number),
        ("notanumber", Property::NotANumber),
        ("normal", Property::Normal),
        ("subnormal", Property::Subnormal),
    ];
    let name = line.take(|m| PROPERTIES.iter().position(|(name, _)| *name == m));
    let index = name.ok_or_else(|| line.unsupported())?;
    let ty = line.ty()?;
    let row = match ty {
        Type::F32 => {
            row!(1, |a: f32, o| compare::test(
                a,
                PROPERTIES[o.immediate as usize].1
            ))
        }
        Type::F64 => {
            row!(1, |a: f64, o| compare::test(
                a,
                PROPERTIES[o.immediate as usize].1
            ))
        }
        _ => return Err(line.unsupported()),
    };
    let operands = Operands {
        immediate: index as u32,
        ..line.operands(Type::Pred, &[ty])?
    };
    line.alu(row, operands, Class::Float, 0)
}
