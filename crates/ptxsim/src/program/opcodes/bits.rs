//! 9.7.1 bit fields and 9.7.8 logic and shifts.

use super::*;
use crate::arith::bits::{self, Permute};
use crate::arith::int;

pub(super) fn decode(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    match line.opcode() {
        "and" | "or" | "xor" | "not" | "cnot" => logic(line),
        "shl" | "shr" => shift(line),
        "shf" => funnel(line),
        "lop3" => lop3(line),
        "prmt" => permute(line),
        "bfe" | "bfi" => field(line),
        "popc" | "clz" | "bfind" | "brev" | "fns" => count(line),
        _ => mask(line),
    }
}

fn finish(
    line: &mut Line<'_, '_, '_>,
    row: RowFn,
    d: Type,
    sources: &[Type],
    immediate: u32,
) -> Decoded<()> {
    let operands = Operands {
        immediate,
        ..line.operands(d, sources)?
    };
    line.alu(row, operands, Class::Integer, 0)
}

fn logic(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let ty = line.ty()?;
    let pred = ty == Type::Pred;
    let (row, sources) = match line.opcode() {
        "and" if pred => (Some(row!(2, |a: bool, b: bool, _| a & b)), 2),
        "or" if pred => (Some(row!(2, |a: bool, b: bool, _| a | b)), 2),
        "xor" if pred => (Some(row!(2, |a: bool, b: bool, _| a ^ b)), 2),
        "not" if pred => (Some(row!(1, |a: bool, _| !a)), 1),
        "and" => (for_integer!(ty, T => row!(2, |a: T, b: T, _| a & b)), 2),
        "or" => (for_integer!(ty, T => row!(2, |a: T, b: T, _| a | b)), 2),
        "xor" => (for_integer!(ty, T => row!(2, |a: T, b: T, _| a ^ b)), 2),
        "not" => (for_integer!(ty, T => row!(1, |a: T, _| !a)), 1),
        _ => (for_integer!(ty, T => row!(1, |a: T, _| T::from(a == 0))), 1),
    };
    let row = row.ok_or_else(|| line.unsupported())?;
    finish(line, row, ty, &[ty; 2][..sources], 0)
}

fn shift(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let ty = line.ty()?;
    let row = if line.opcode() == "shl" {
        for_integer!(ty, T => row!(2, |a: T, b: u32, _| int::shl(a, b)))
    } else {
        for_integer!(ty, T => row!(2, |a: T, b: u32, _| int::shr(a, b)))
    };
    let row = row.ok_or_else(|| line.unsupported())?;
    finish(line, row, ty, &[ty, Type::U32], 0)
}

fn funnel(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let left = line.flag("l");
    if !left && !line.flag("r") {
        return Err(line.unsupported());
    }
    let wrap = line.flag("wrap");
    if !wrap && !line.flag("clamp") {
        return Err(line.unsupported());
    }
    let ty = line.ty()?;
    let row = if left {
        row!(3, |a: u32, b: u32, c: u32, o| bits::shf_l(
            a,
            b,
            c,
            o.immediate != 0
        ))
    } else {
        row!(3, |a: u32, b: u32, c: u32, o| bits::shf_r(
            a,
            b,
            c,
            o.immediate != 0
        ))
    };
    finish(line, row, ty, &[Type::B32; 3], wrap.into())
}

fn immediate(line: &Line<'_, '_, '_>, index: usize) -> Decoded<u32> {
    match line.operand(index)? {
        crate::syntax::ast::Operand::Int(value) => Ok(*value as u32),
        _ => Err(line.error("this operand must be a number")),
    }
}

fn lop3(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    line.ty()?;
    let table = immediate(line, 4)?;
    let operands = Operands {
        d: line.d(0, Type::B32)?,
        a: line.src(1, Type::B32)?,
        b: line.src(2, Type::B32)?,
        c: line.src(3, Type::B32)?,
        immediate: table,
        ..Operands::default()
    };
    let row = row!(3, |a: u32, b: u32, c: u32, o| bits::lop3(
        a,
        b,
        c,
        o.immediate as u8
    ));
    line.alu(row, operands, Class::Integer, 0)
}

fn permute(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    line.ty()?;
    let modes = [
        (
            "f4e",
            row!(3, |a: u32, b: u32, c: u32, _| bits::prmt(
                a,
                b,
                c,
                Permute::Forward4
            )),
        ),
        (
            "b4e",
            row!(3, |a: u32, b: u32, c: u32, _| bits::prmt(
                a,
                b,
                c,
                Permute::Backward4
            )),
        ),
        (
            "rc8",
            row!(3, |a: u32, b: u32, c: u32, _| bits::prmt(
                a,
                b,
                c,
                Permute::Replicate8
            )),
        ),
        (
            "ecl",
            row!(3, |a: u32, b: u32, c: u32, _| bits::prmt(
                a,
                b,
                c,
                Permute::EdgeClampLeft
            )),
        ),
        (
            "ecr",
            row!(3, |a: u32, b: u32, c: u32, _| bits::prmt(
                a,
                b,
                c,
                Permute::EdgeClampRight
            )),
        ),
        (
            "rc16",
            row!(3, |a: u32, b: u32, c: u32, _| bits::prmt(
                a,
                b,
                c,
                Permute::Replicate16
            )),
        ),
    ];
    let generic = row!(3, |a: u32, b: u32, c: u32, _| bits::prmt(
        a,
        b,
        c,
        Permute::Generic
    ));
    let row = line.choice(&modes).unwrap_or(generic);
    finish(line, row, Type::B32, &[Type::B32; 3], 0)
}

fn field(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let ty = line.ty()?;
    let extract = line.opcode() == "bfe";
    let row = match (extract, ty.bits()) {
        (true, 32) => row!(3, |a: u32, b: u32, c: u32, o| {
            bits::bfe(a.into(), b, c, o.immediate != 0, 32) as u32
        }),
        (true, 64) => row!(3, |a: u64, b: u32, c: u32, o| bits::bfe(
            a,
            b,
            c,
            o.immediate != 0,
            64
        )),
        (false, 32) => row!(4, |a: u32, b: u32, c: u32, d: u32, _| {
            bits::bfi(a.into(), b.into(), c, d, 32) as u32
        }),
        (false, 64) => row!(4, |a: u64, b: u64, c: u32, d: u32, _| bits::bfi(
            a, b, c, d, 64
        )),
        _ => return Err(line.unsupported()),
    };
    let sources = [ty, ty, Type::U32, Type::U32];
    let sources = if extract { &sources[1..] } else { &sources };
    finish(line, row, ty, sources, ty.is_signed().into())
}

fn count(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let shift_amount = line.flag("shiftamt");
    let ty = line.ty()?;
    let (d, row) = match (line.opcode(), ty.bits()) {
        ("popc", 32) => (Type::U32, row!(1, |a: u32, _| a.count_ones())),
        ("popc", 64) => (Type::U32, row!(1, |a: u64, _| a.count_ones())),
        ("clz", 32) => (Type::U32, row!(1, |a: u32, _| a.leading_zeros())),
        ("clz", 64) => (Type::U32, row!(1, |a: u64, _| a.leading_zeros())),
        ("brev", 32) => (ty, row!(1, |a: u32, _| a.reverse_bits())),
        ("brev", 64) => (ty, row!(1, |a: u64, _| a.reverse_bits())),
        ("bfind", 32) => (
            Type::U32,
            row!(1, |a: u32, o| {
                let signed = o.immediate & 1 != 0;
                let value = if signed {
                    i64::from(a as i32)
                } else {
                    i64::from(a)
                };
                bits::bfind(value, signed, 32, o.immediate & 2 != 0)
            }),
        ),
        ("bfind", 64) => (
            Type::U32,
            row!(1, |a: i64, o| {
                bits::bfind(a, o.immediate & 1 != 0, 64, o.immediate & 2 != 0)
            }),
        ),
        ("fns", 32) => {
            let row = row!(3, |a: u32, b: u32, c: i32, _| bits::fns(a, b, c));
            return finish(line, row, Type::B32, &[Type::B32, Type::B32, Type::S32], 0);
        }
        _ => return Err(line.unsupported()),
    };
    let flags = u32::from(ty.is_signed()) | u32::from(shift_amount) << 1;
    finish(line, row, d, &[ty], flags)
}

/// `bmsk` and `szext`.
fn mask(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let wrap = line.flag("wrap");
    if !wrap && !line.flag("clamp") {
        return Err(line.unsupported());
    }
    let ty = line.ty()?;
    let row = if line.opcode() == "bmsk" {
        row!(2, |a: u32, b: u32, o| bits::bmsk(
            a,
            b,
            o.immediate & 2 != 0
        ))
    } else {
        row!(2, |a: u32, b: u32, o| {
            bits::szext(a, b, o.immediate & 1 != 0, o.immediate & 2 != 0)
        })
    };
    let flags = u32::from(ty.is_signed()) | u32::from(wrap) << 1;
    finish(line, row, Type::B32, &[Type::B32, Type::U32], flags)
}
