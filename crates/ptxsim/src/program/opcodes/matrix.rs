//! 9.7.14 `ldmatrix`, `stmatrix`, `movmatrix`, `mma.sync`.

use super::*;
use crate::matrix::mma::{Accumulator, Input, Mma};
use crate::report::AccessKind;

pub(super) fn decode(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    if !line.flag("sync") || !line.flag("aligned") {
        return Err(line.unsupported());
    }
    match line.opcode() {
        "mma" => multiply(line),
        "movmatrix" => {
            if !line.flag("m8n8") || !line.flag("trans") || line.ty()? != Type::B16 {
                return Err(line.unsupported());
            }
            let (d, a) = (line.d(0, Type::B32)?, line.src(1, Type::B32)?);
            line.emit(Op::TransposeMatrix { d, a }, Class::Memory, 0)
        }
        _ => movement(line),
    }
}

fn movement(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let loads = line.opcode() == "ldmatrix";
    if !line.flag("m8n8") {
        return Err(line.unsupported());
    }
    let count = line
        .choice(&[("x1", 1), ("x2", 2), ("x4", 4)])
        .ok_or_else(|| line.unsupported())?;
    let transposed = line.flag("trans");
    let space = memory::space(line);
    if line.ty()? != Type::B16 || !matches!(space, AddressSpace::Shared | AddressSpace::Generic) {
        return Err(line.unsupported());
    }
    let registers = if loads {
        let registers = line.d_parts(0)?;
        registers
            .iter()
            .map(|reg| word(line, *reg))
            .collect::<Decoded<Vec<Slot>>>()?
    } else {
        line.src_parts(1, Type::B32)?
    };
    if registers.len() != count {
        return Err(line.error(format!("`.x{count}` needs {count} registers")));
    }
    let (space, address) = memory::address(line, usize::from(loads), space)?;
    let kind = if loads {
        AccessKind::Read
    } else {
        AccessKind::Write
    };
    let movement = Box::new(MatrixMove {
        address,
        space,
        transposed,
        registers,
        kind,
    });
    let op = if loads {
        Op::LoadMatrix(movement)
    } else {
        Op::StoreMatrix(movement)
    };
    line.emit(op, Class::Memory, 0)
}

fn word(line: &mut Line<'_, '_, '_>, reg: Reg) -> Decoded<Slot> {
    match reg {
        Reg::Word(slot, 32) => Ok(slot),
        Reg::Sink => Ok(line.decoder.new_word()),
        _ => Err(line.error("a fragment is made of 32-bit registers")),
    }
}

pub(super) fn input(ty: Type) -> Option<Input> {
    Some(match ty {
        Type::F16 => Input::F16,
        Type::Bf16 => Input::Bf16,
        Type::Tf32 => Input::Tf32,
        Type::E4m3 => Input::E4m3,
        Type::E5m2 => Input::E5m2,
        Type::F64 => Input::F64,
        Type::S8 => Input::S8,
        Type::U8 => Input::U8,
        Type::S4 => Input::S4,
        Type::U4 => Input::U4,
        _ => return None,
    })
}

pub(super) fn accumulator(ty: Type) -> Option<Accumulator> {
    Some(match ty {
        Type::F16 => Accumulator::F16,
        Type::F32 => Accumulator::F32,
        Type::F64 => Accumulator::F64,
        Type::S32 => Accumulator::S32,
        _ => return None,
    })
}

/// `m16n8k16` as its three numbers.
pub(super) fn shape(modifier: &str) -> Option<(usize, usize, usize)> {
    let (m, rest) = modifier.strip_prefix('m')?.split_once('n')?;
    let (n, k) = rest.split_once('k')?;
    Some((m.parse().ok()?, n.parse().ok()?, k.parse().ok()?))
}

fn multiply(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let (m, n, k) = line.take(shape).ok_or_else(|| line.unsupported())?;
    if !line.flag("row") || !line.flag("col") {
        return Err(line.unsupported());
    }
    let satfinite = line.flag("satfinite");
    let (d_ty, a_ty, b_ty, c_ty) = (line.ty()?, line.ty()?, line.ty()?, line.ty()?);
    let types = (
        input(a_ty),
        input(b_ty),
        accumulator(c_ty),
        accumulator(d_ty),
    );
    let (Some(a), Some(b), Some(c), Some(d)) = types else {
        return Err(line.unsupported());
    };
    let shape = Mma {
        m,
        n,
        k,
        a,
        b,
        c,
        d,
        satfinite,
    };
    if !shape.is_supported() {
        return Err(line.unsupported());
    }
    let wide = a == Input::F64;
    let (factor, fragment) = if wide { (2, Type::F64) } else { (1, Type::B32) };
    let accumulator_registers =
        |ty: Type| shape.accumulator_elements() / if ty == Type::F16 { 2 } else { 1 };
    let d_registers = line.d_parts(0)?;
    let take = |reg: &Reg| match reg {
        Reg::Word(slot, 32) if !wide => Some(*slot),
        Reg::Wide(slot) if wide => Some(*slot),
        _ => None,
    };
    let d = d_registers.iter().map(take).collect::<Option<Vec<Slot>>>();
    let multiply = MatrixMultiply {
        shape,
        d: d.ok_or_else(|| line.error("the result's registers have the wrong width"))?,
        a: line.src_parts(1, fragment)?,
        b: line.src_parts(2, fragment)?,
        c: line.src_parts(3, fragment)?,
    };
    let sizes = [
        multiply.a.len(),
        multiply.b.len(),
        multiply.c.len(),
        multiply.d.len(),
    ];
    let expected = [
        shape.a_registers() / factor,
        shape.b_registers() / factor,
        accumulator_registers(c_ty),
        accumulator_registers(d_ty),
    ];
    if sizes != expected {
        let message = format!("the fragments need {expected:?} registers, these are {sizes:?}");
        return Err(line.error(message));
    }
    let float = !matches!(a, Input::S8 | Input::U8 | Input::S4 | Input::U4);
    let flops = if float {
        2 * shape.multiply_adds() as u32
    } else {
        0
    };
    line.emit(Op::MatrixMultiply(Box::new(multiply)), Class::Matrix, flops)
}
