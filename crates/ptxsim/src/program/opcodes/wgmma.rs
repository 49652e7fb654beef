//! 9.7.15 `wgmma`.

use super::*;
use crate::matrix::mma::Accumulator;
use crate::matrix::wgmma::Wgmma;
use crate::syntax::ast::Operand;

pub(super) fn decode(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let operations = [
        ("mma_async", 0),
        ("fence", 1),
        ("commit_group", 2),
        ("wait_group", 3),
    ];
    let operation = line.choice(&operations);
    if !line.flag("sync") || !line.flag("aligned") {
        return Err(line.unsupported());
    }
    match operation {
        Some(0) => multiply(line),
        Some(1) => line.emit(Op::WarpgroupFence, Class::Synchronization, 0),
        Some(2) => line.emit(Op::WarpgroupCommit, Class::Synchronization, 0),
        Some(_) => {
            let Operand::Int(pending) = line.operand(0)? else {
                return Err(line.error("`wgmma.wait_group` takes a number"));
            };
            let pending = (*pending).clamp(0, 1 << 20) as u32;
            line.emit(Op::WarpgroupWait { pending }, Class::Synchronization, 0)
        }
        None => Err(line.unsupported()),
    }
}

fn multiply(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let (m, n, k) = line.take(matrix::shape).ok_or_else(|| line.unsupported())?;
    let (d_ty, a_ty, b_ty) = (line.ty()?, line.ty()?, line.ty()?);
    let types = (
        matrix::input(a_ty),
        matrix::input(b_ty),
        matrix::accumulator(d_ty),
    );
    let (Some(a), Some(b), Some(d)) = types else {
        return Err(line.unsupported());
    };
    let from_registers = matches!(line.operand(1)?, Operand::Vector(_));
    let flags = (4..line.operand_count())
        .map(|index| immediate(line, index))
        .collect::<Decoded<Vec<i128>>>()?;
    // Scales of A and B, then what is transposed: B alone where A is in registers.
    let (scales, transposed) = flags.split_at(flags.len().min(2));
    let (a_transposed, b_transposed) = match (transposed, from_registers) {
        ([], _) => (false, false),
        ([b], true) => (false, *b == 1),
        ([a, b], false) => (*a == 1, *b == 1),
        _ => return Err(line.error("these are too many immediates")),
    };
    let &[negate_a, negate_b] = scales else {
        return Err(line.error("`wgmma.mma_async` needs the scales of A and B"));
    };
    let shape = Wgmma {
        n,
        a,
        b,
        d,
        negate_a: negate_a == -1,
        negate_b: negate_b == -1,
    };
    let transposable = a.bits() == 16 || !(a_transposed || b_transposed);
    if m != 64 || k != shape.k() || !shape.is_supported() || !transposable {
        return Err(line.unsupported());
    }
    let a = if from_registers {
        WarpgroupA::Registers(line.src_parts(1, Type::B32)?)
    } else {
        WarpgroupA::Descriptor(line.src(1, Type::B64)?)
    };
    let d_registers = line.d_parts(0)?;
    let word = |reg: &Reg| match reg {
        Reg::Word(slot, 32) => Some(*slot),
        _ => None,
    };
    let d = d_registers.iter().map(word).collect::<Option<Vec<Slot>>>();
    let d = d.filter(|d| d.len() == shape.d_registers());
    let d = d.ok_or_else(|| {
        let kind = if shape.d == Accumulator::F16 {
            "f16x2"
        } else {
            "f32"
        };
        line.error(format!(
            "the result needs {} registers of {kind}",
            shape.d_registers()
        ))
    })?;
    if matches!(&a, WarpgroupA::Registers(a) if a.len() != 4) {
        return Err(line.error("A in registers needs 4 of them"));
    }
    let multiply = WarpgroupMultiply {
        shape,
        a,
        b: line.src(2, Type::B64)?,
        d,
        scale_d: line.src(3, Type::Pred)?,
        a_transposed,
        b_transposed,
    };
    // A quarter of the warpgroup's.
    let flops = shape.multiply_adds() as u32 / 2;
    line.emit(
        Op::WarpgroupMultiply(Box::new(multiply)),
        Class::Matrix,
        flops,
    )
}

fn immediate(line: &Line<'_, '_, '_>, index: usize) -> Decoded<i128> {
    match line.operand(index)? {
        Operand::Int(value) => Ok(*value),
        _ => Err(line.error(format!("operand {} of `wgmma` is an immediate", index + 1))),
    }
}
