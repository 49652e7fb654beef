//! 9.7.5 comparison and selection.

use half::{bf16, f16};

use super::*;
use crate::arith::compare::{Comparison, compare, compare_float};
use crate::arith::float::Mode;

const COMPARISONS: [(&str, Comparison); 18] = [
    ("eq", Comparison::Eq),
    ("ne", Comparison::Ne),
    ("lt", Comparison::Lt),
    ("le", Comparison::Le),
    ("gt", Comparison::Gt),
    ("ge", Comparison::Ge),
    ("lo", Comparison::Lt),
    ("ls", Comparison::Le),
    ("hi", Comparison::Gt),
    ("hs", Comparison::Ge),
    ("equ", Comparison::Equ),
    ("neu", Comparison::Neu),
    ("ltu", Comparison::Ltu),
    ("leu", Comparison::Leu),
    ("gtu", Comparison::Gtu),
    ("geu", Comparison::Geu),
    ("num", Comparison::Num),
    ("nan", Comparison::Nan),
];

pub(super) fn decode(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    match line.opcode() {
        "setp" | "set" => set(line),
        "selp" => select(line),
        _ => {
            let (ty, c) = (line.ty()?, line.ty()?);
            let row = match (ty.bits(), c) {
                (32, Type::S32) => row!(3, |a: u32, b: u32, c: i32, _| if c >= 0 { a } else { b }),
                (64, Type::S32) => row!(3, |a: u64, b: u64, c: i32, _| if c >= 0 { a } else { b }),
                (32, Type::F32) => {
                    row!(3, |a: u32, b: u32, c: f32, _| if c >= 0.0 { a } else { b })
                }
                (64, Type::F32) => {
                    row!(3, |a: u64, b: u64, c: f32, _| if c >= 0.0 { a } else { b })
                }
                _ => return Err(line.unsupported()),
            };
            let operands = line.operands(ty, &[ty, ty, c])?;
            line.alu(row, operands, Class::Integer, 0)
        }
    }
}

fn select(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let ty = line.ty()?;
    let row = match ty.bits() {
        16 | 32 => row!(3, |a: u32, b: u32, c: bool, _| if c { a } else { b }),
        64 => row!(3, |a: u64, b: u64, c: bool, _| if c { a } else { b }),
        _ => return Err(line.unsupported()),
    };
    let operands = line.operands(ty, &[ty, ty, Type::Pred])?;
    line.alu(row, operands, Class::Integer, 0)
}

/// The rows of one comparison, with the common ones known to the compiler.
macro_rules! comparison_row {
    ($T:ty, $comparison:expr) => {
        match $comparison {
            Comparison::Eq => row!(2, |a: $T, b: $T, _| compare(a, b, Comparison::Eq)),
            Comparison::Ne => row!(2, |a: $T, b: $T, _| compare(a, b, Comparison::Ne)),
            Comparison::Lt => row!(2, |a: $T, b: $T, _| compare(a, b, Comparison::Lt)),
            Comparison::Le => row!(2, |a: $T, b: $T, _| compare(a, b, Comparison::Le)),
            Comparison::Gt => row!(2, |a: $T, b: $T, _| compare(a, b, Comparison::Gt)),
            Comparison::Ge => row!(2, |a: $T, b: $T, _| compare(a, b, Comparison::Ge)),
            _ => row!(2, |a: $T, b: $T, o| compare(a, b, o.comparison)),
        }
    };
}

/// Compares both halves of a pair; `$f` makes the result from the two answers.
macro_rules! packed_rows {
    ($ty:expr, $f:expr) => {
        match $ty {
            Type::F16x2 => Some(row!(2, |a: [f16; 2], b: [f16; 2], o| {
                $f([0, 1].map(|i| compare_float(a[i], b[i], o.comparison, o.mode.ftz)))
            })),
            Type::Bf16x2 => Some(row!(2, |a: [bf16; 2], b: [bf16; 2], o| {
                $f([0, 1].map(|i| compare_float(a[i], b[i], o.comparison, o.mode.ftz)))
            })),
            _ => None,
        }
    };
}

/// `set` and `setp` on pairs, without a combination.
fn set_packed(
    line: &mut Line<'_, '_, '_>,
    comparison: Comparison,
    ftz: bool,
    result: Option<Type>,
    ty: Type,
) -> Decoded<()> {
    let (a, b) = (line.src(1, ty)?, line.src(2, ty)?);
    let mode = Mode { ftz, ..Mode::RN };
    let operands = Operands {
        a,
        b,
        comparison,
        mode,
        ..Operands::default()
    };
    if line.operand_count() > 3 {
        return Err(line.unsupported());
    }
    let Some(result) = result else {
        let (Reg::Predicate(d), Some(Reg::Predicate(q))) = line.pair(0)? else {
            return Err(line.error("`setp` on pairs writes two predicates, `p|q`"));
        };
        let low = packed_rows!(ty, |[low, _]: [bool; 2]| low);
        let high = packed_rows!(ty, |[_, high]: [bool; 2]| high);
        let (Some(low), Some(high)) = (low, high) else {
            return Err(line.unsupported());
        };
        line.step(low, Operands { d, ..operands });
        return line.alu(high, Operands { d: q, ..operands }, Class::Integer, 0);
    };
    const fn ones(halves: [bool; 2], bits: u32) -> u32 {
        (halves[0] as u32 * bits) | (halves[1] as u32 * bits) << 16
    }
    let row = match result {
        // 1.0 in either type.
        Type::F16x2 => packed_rows!(ty, |halves| ones(halves, 0x3c00)),
        Type::Bf16x2 => packed_rows!(ty, |halves| ones(halves, 0x3f80)),
        Type::U32 | Type::S32 => packed_rows!(ty, |halves| ones(halves, 0xffff)),
        _ => None,
    };
    let row = row.ok_or_else(|| line.unsupported())?;
    let d = line.d(0, result)?;
    line.alu(row, Operands { d, ..operands }, Class::Integer, 0)
}

fn set(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let find = |m: &str| {
        COMPARISONS
            .iter()
            .find(|(name, _)| *name == m)
            .map(|(_, c)| *c)
    };
    let comparison = line.take(find).ok_or_else(|| line.unsupported())?;
    let combine: Option<RowFn> = line.choice(&[
        ("and", row!(2, |a: bool, b: bool, _| a & b)),
        ("or", row!(2, |a: bool, b: bool, _| a | b)),
        ("xor", row!(2, |a: bool, b: bool, _| a ^ b)),
    ]);
    let ftz = line.flag("ftz");
    let result = if line.opcode() == "set" {
        Some(line.ty()?)
    } else {
        None
    };
    let ty = line.ty()?;
    if ty.packed() == 2 {
        return set_packed(line, comparison, ftz, result, ty);
    }
    let row = match for_integer!(ty, T => comparison_row!(T, comparison)) {
        Some(row) => Some(row),
        None if ftz => for_float!(ty, T => row!(2, |a: T, b: T, o| {
            compare_float(a, b, o.comparison, true)
        })),
        None => for_float!(ty, T => comparison_row!(T, comparison)),
    };
    let row = row.ok_or_else(|| line.unsupported())?;
    let (a, b) = (line.src(1, ty)?, line.src(2, ty)?);
    let operands = Operands {
        a,
        b,
        comparison,
        ..Operands::default()
    };
    if result.is_none()
        && combine.is_none()
        && let (Reg::Predicate(d), None) = line.pair(0)?
    {
        return line.alu(row, Operands { d, ..operands }, Class::Integer, 0);
    }
    let truth = line.decoder.new_predicate();
    line.step(
        row,
        Operands {
            d: truth,
            ..operands
        },
    );
    let both = |line: &mut Line<'_, '_, '_>, truth| -> Decoded<Slot> {
        let Some(row) = combine else { return Ok(truth) };
        let (d, b) = (line.decoder.new_predicate(), line.src(3, Type::Pred)?);
        line.step(
            row,
            Operands {
                d,
                a: truth,
                b,
                ..Operands::default()
            },
        );
        Ok(d)
    };
    if let Some(result) = result {
        let a = both(line, truth)?;
        let row = match result {
            Type::F32 => row!(1, |a: bool, _| if a { 1.0f32 } else { 0.0 }),
            Type::U32 | Type::S32 => row!(1, |a: bool, _| if a { u32::MAX } else { 0 }),
            Type::U16 | Type::S16 => row!(1, |a: bool, _| if a { u16::MAX } else { 0 }),
            Type::F16 => row!(1, |a: bool, _| f16::from_f32(f32::from(u8::from(a)))),
            Type::Bf16 => row!(1, |a: bool, _| bf16::from_f32(f32::from(u8::from(a)))),
            _ => return Err(line.unsupported()),
        };
        let operands = Operands {
            d: line.d(0, result)?,
            a,
            ..Operands::default()
        };
        return line.alu(row, operands, Class::Integer, 0);
    }
    let (p, q) = line.pair(0)?;
    if let Some(Reg::Predicate(q)) = q {
        let falsehood = line.decoder.new_predicate();
        let operands = Operands {
            d: falsehood,
            a: truth,
            ..Operands::default()
        };
        line.step(row!(1, |a: bool, _| !a), operands);
        let a = both(line, falsehood)?;
        // Before `p` is written: `p` may be an operand of the combination.
        line.step(
            row!(1, |a: bool, _| a),
            Operands {
                d: q,
                a,
                ..Operands::default()
            },
        );
    }
    let a = both(line, truth)?;
    match p {
        Reg::Predicate(d) => {
            let operands = Operands {
                d,
                a,
                ..Operands::default()
            };
            line.alu(row!(1, |a: bool, _| a), operands, Class::Integer, 0)
        }
        Reg::Sink => line.emit(Op::Nothing, Class::Integer, 0),
        _ => Err(line.error("`setp` writes a predicate")),
    }
}
