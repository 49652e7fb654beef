//! 9.7.1 integer arithmetic and 9.7.2 extended precision.

use super::*;
use crate::arith::{dot, int};

pub(super) fn decode(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    match line.opcode() {
        "add" | "sub" => add(line),
        "addc" | "subc" => add_with_carry(line),
        "mul" | "mad" => multiply(line),
        "madc" => multiply_with_carry(line),
        "mul24" | "mad24" => multiply24(line),
        "dp4a" | "dp2a" => dot_product(line),
        _ => simple(line),
    }
}

fn add(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let (saturate, carry_out) = (line.flag("sat"), line.flag("cc"));
    let subtract = line.opcode() == "sub";
    if carry_out {
        return add_with_carry_in(line, false, true);
    }
    let ty = line.ty()?;
    if let Type::U16x2 | Type::S16x2 = ty {
        let row = if subtract {
            row!(2, |a: [u16; 2], b: [u16; 2], _| [
                int::sub(a[0], b[0]),
                int::sub(a[1], b[1])
            ])
        } else {
            row!(2, |a: [u16; 2], b: [u16; 2], _| [
                int::add(a[0], b[0]),
                int::add(a[1], b[1])
            ])
        };
        let operands = line.operands(ty, &[ty, ty])?;
        return line.alu(row, operands, Class::Integer, 0);
    }
    let row = match (subtract, saturate) {
        (false, false) => for_integer!(ty, T => row!(2, |a: T, b: T, _| int::add(a, b))),
        (true, false) => for_integer!(ty, T => row!(2, |a: T, b: T, _| int::sub(a, b))),
        (false, true) => for_integer!(ty, T => row!(2, |a: T, b: T, _| int::add_sat(a, b))),
        (true, true) => for_integer!(ty, T => row!(2, |a: T, b: T, _| int::sub_sat(a, b))),
    };
    finish(line, row, ty, &[ty, ty])
}

fn finish(
    line: &mut Line<'_, '_, '_>,
    row: Option<RowFn>,
    d: Type,
    sources: &[Type],
) -> Decoded<()> {
    let row = row.ok_or_else(|| line.unsupported())?;
    let operands = line.operands(d, sources)?;
    line.alu(row, operands, Class::Integer, 0)
}

fn add_with_carry(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let carry_out = line.flag("cc");
    add_with_carry_in(line, true, carry_out)
}

/// `add.cc`, `addc`, `addc.cc` and the same of `sub`: the carry is a predicate.
fn add_with_carry_in(line: &mut Line<'_, '_, '_>, carry_in: bool, carry_out: bool) -> Decoded<()> {
    let ty = line.ty()?;
    let row = if line.opcode().starts_with("sub") {
        for_integer!(ty, T => row!(predicate, |a: T, b: T, c: bool, _| int::sub_borrow(a, b, c)))
    } else {
        for_integer!(ty, T => row!(predicate, |a: T, b: T, c: bool, _| int::add_carry(a, b, c)))
    };
    let row = row.ok_or_else(|| line.unsupported())?;
    let mut operands = line.operands(ty, &[ty, ty])?;
    carries(line, &mut operands, carry_in, carry_out);
    line.alu(row, operands, Class::Integer, 0)
}

fn carries(line: &mut Line<'_, '_, '_>, operands: &mut Operands, carry_in: bool, carry_out: bool) {
    let carry = line.decoder.carry();
    operands.c = if carry_in {
        carry
    } else {
        super::super::decoder::FALSE
    };
    operands.q = if carry_out {
        carry
    } else {
        line.decoder.new_predicate()
    };
}

#[derive(Clone, Copy, PartialEq)]
enum Part {
    Low,
    High,
    Wide,
}

const PARTS: [(&str, Part); 3] = [("lo", Part::Low), ("hi", Part::High), ("wide", Part::Wide)];

fn multiply(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let part = line.choice(&PARTS).ok_or_else(|| line.unsupported())?;
    let (saturate, carry_out) = (line.flag("sat"), line.flag("cc"));
    let add = line.opcode() == "mad";
    if carry_out {
        return multiply_carry(line, part, false, true);
    }
    let ty = line.ty()?;
    if part == Part::Wide {
        let (wide, row) = match (ty, add) {
            (Type::U16, false) => (
                Type::U32,
                row!(2, |a: u16, b: u16, _| -> u32 { int::mul_wide(a, b) }),
            ),
            (Type::S16, false) => (
                Type::S32,
                row!(2, |a: i16, b: i16, _| -> i32 { int::mul_wide(a, b) }),
            ),
            (Type::U32, false) => (
                Type::U64,
                row!(2, |a: u32, b: u32, _| -> u64 { int::mul_wide(a, b) }),
            ),
            (Type::S32, false) => (
                Type::S64,
                row!(2, |a: i32, b: i32, _| -> i64 { int::mul_wide(a, b) }),
            ),
            (Type::U16, true) => (
                Type::U32,
                row!(3, |a: u16, b: u16, c: u32, _| int::mad_wide(a, b, c)),
            ),
            (Type::S16, true) => (
                Type::S32,
                row!(3, |a: i16, b: i16, c: i32, _| int::mad_wide(a, b, c)),
            ),
            (Type::U32, true) => (
                Type::U64,
                row!(3, |a: u32, b: u32, c: u64, _| int::mad_wide(a, b, c)),
            ),
            (Type::S32, true) => (
                Type::S64,
                row!(3, |a: i32, b: i32, c: i64, _| int::mad_wide(a, b, c)),
            ),
            _ => return Err(line.unsupported()),
        };
        let sources = [ty, ty, wide];
        return finish(
            line,
            Some(row),
            wide,
            if add { &sources } else { &sources[..2] },
        );
    }
    let row = match (part, add, saturate) {
        (Part::Low, false, false) => {
            for_integer!(ty, T => row!(2, |a: T, b: T, _| int::mul_lo(a, b)))
        }
        (Part::High, false, false) => {
            for_integer!(ty, T => row!(2, |a: T, b: T, _| int::mul_hi(a, b)))
        }
        (Part::Low, true, false) => {
            for_integer!(ty, T => row!(3, |a: T, b: T, c: T, _| int::mad_lo(a, b, c)))
        }
        (Part::High, true, false) => {
            for_integer!(ty, T => row!(3, |a: T, b: T, c: T, _| int::mad_hi(a, b, c)))
        }
        (Part::High, true, true) => {
            for_integer!(ty, T => row!(3, |a: T, b: T, c: T, _| int::mad_hi_sat(a, b, c)))
        }
        _ => None,
    };
    finish(line, row, ty, &[ty; 3][..if add { 3 } else { 2 }])
}

fn multiply_with_carry(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let part = line.choice(&PARTS).ok_or_else(|| line.unsupported())?;
    let carry_out = line.flag("cc");
    multiply_carry(line, part, true, carry_out)
}

/// `mad.lo.cc` and its kin: the product, then the sum with its carry, as two instructions.
fn multiply_carry(
    line: &mut Line<'_, '_, '_>,
    part: Part,
    carry_in: bool,
    carry_out: bool,
) -> Decoded<()> {
    let ty = line.ty()?;
    let product = match part {
        Part::Low => for_integer!(ty, T => row!(2, |a: T, b: T, _| int::mul_lo(a, b))),
        Part::High => for_integer!(ty, T => row!(2, |a: T, b: T, _| int::mul_hi(a, b))),
        Part::Wide => None,
    };
    let sum =
        for_integer!(ty, T => row!(predicate, |a: T, b: T, c: bool, _| int::add_carry(a, b, c)));
    let (Some(product), Some(sum)) = (product, sum) else {
        return Err(line.unsupported());
    };
    let between = match ty.bits() {
        64 => line.decoder.new_wide(),
        _ => line.decoder.new_word(),
    };
    let operands = line.operands(ty, &[ty; 3])?;
    line.step(
        product,
        Operands {
            d: between,
            ..operands
        },
    );
    let mut operands = Operands {
        a: between,
        b: operands.c,
        ..operands
    };
    carries(line, &mut operands, carry_in, carry_out);
    line.alu(sum, operands, Class::Integer, 0)
}

fn multiply24(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let high = match line.choice(&PARTS) {
        Some(Part::Low) => false,
        Some(Part::High) => true,
        _ => return Err(line.unsupported()),
    };
    let ty = line.ty()?;
    let row = match (line.opcode(), ty) {
        ("mul24", Type::U32) => row!(2, |a: u32, b: u32, o| int::mul24(a, b, o.immediate != 0)),
        ("mul24", Type::S32) => row!(2, |a: i32, b: i32, o| int::mul24(a, b, o.immediate != 0)),
        ("mad24", Type::U32) => {
            row!(3, |a: u32, b: u32, c: u32, o| int::mul24(
                a,
                b,
                o.immediate != 0
            )
            .wrapping_add(c))
        }
        ("mad24", Type::S32) => {
            row!(3, |a: i32, b: i32, c: i32, o| int::mul24(
                a,
                b,
                o.immediate != 0
            )
            .wrapping_add(c))
        }
        _ => return Err(line.unsupported()),
    };
    let sources = if line.opcode() == "mad24" { 3 } else { 2 };
    let operands = Operands {
        immediate: high.into(),
        ..line.operands(ty, &[ty; 3][..sources])?
    };
    line.alu(row, operands, Class::Integer, 0)
}

fn dot_product(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let four = line.opcode() == "dp4a";
    let high = !four && line.flag("hi");
    if !four && !high && !line.flag("lo") {
        return Err(line.unsupported());
    }
    let (a, b) = (line.ty()?, line.ty()?);
    let row = if four {
        row!(3, |a: u32, b: u32, c: u32, o| {
            dot::dp4a(a, o.immediate & 1 != 0, b, o.immediate & 2 != 0, c)
        })
    } else {
        row!(3, |a: u32, b: u32, c: u32, o| {
            let flags = o.immediate;
            dot::dp2a(a, flags & 1 != 0, b, flags & 2 != 0, flags & 4 != 0, c)
        })
    };
    let flags = u32::from(a.is_signed()) | u32::from(b.is_signed()) << 1 | u32::from(high) << 2;
    let operands = line.operands(Type::U32, &[Type::U32; 3])?;
    line.alu(
        row,
        Operands {
            immediate: flags,
            ..operands
        },
        Class::Integer,
        0,
    )
}

fn simple(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let relu = line.flag("relu");
    let ty = line.ty()?;
    let (row, sources) = match line.opcode() {
        "div" => (
            for_integer!(ty, T => row!(2, |a: T, b: T, _| int::div(a, b))),
            2,
        ),
        "rem" => (
            for_integer!(ty, T => row!(2, |a: T, b: T, _| int::rem(a, b))),
            2,
        ),
        "abs" => (for_integer!(ty, T => row!(1, |a: T, _| int::abs(a))), 1),
        "neg" => (for_integer!(ty, T => row!(1, |a: T, _| int::neg(a))), 1),
        "sad" => (
            for_integer!(ty, T => row!(3, |a: T, b: T, c: T, _| int::sad(a, b, c))),
            3,
        ),
        "min" => match ty {
            Type::U16x2 => (
                Some(row!(2, |a: [u16; 2], b: [u16; 2], _| [
                    a[0].min(b[0]),
                    a[1].min(b[1])
                ])),
                2,
            ),
            Type::S16x2 => (
                Some(row!(2, |a: [i16; 2], b: [i16; 2], _| [
                    a[0].min(b[0]),
                    a[1].min(b[1])
                ])),
                2,
            ),
            _ if relu => (
                for_integer!(ty, T => row!(2, |a: T, b: T, _| int::relu(a.min(b)))),
                2,
            ),
            _ => (for_integer!(ty, T => row!(2, |a: T, b: T, _| a.min(b))), 2),
        },
        "max" => match ty {
            Type::U16x2 => (
                Some(row!(2, |a: [u16; 2], b: [u16; 2], _| [
                    a[0].max(b[0]),
                    a[1].max(b[1])
                ])),
                2,
            ),
            Type::S16x2 => (
                Some(row!(2, |a: [i16; 2], b: [i16; 2], _| [
                    a[0].max(b[0]),
                    a[1].max(b[1])
                ])),
                2,
            ),
            _ if relu => (
                for_integer!(ty, T => row!(2, |a: T, b: T, _| int::relu(a.max(b)))),
                2,
            ),
            _ => (for_integer!(ty, T => row!(2, |a: T, b: T, _| a.max(b))), 2),
        },
        _ => (None, 0),
    };
    finish(line, row, ty, &[ty; 3][..sources])
}
