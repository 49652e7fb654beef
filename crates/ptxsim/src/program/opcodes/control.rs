//! 9.7.12 control flow and 9.7.13 barriers.

use super::super::decoder::{Symbol, TRUE};
use super::*;
use crate::syntax::ast::Operand;

pub(super) fn decode(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    match line.opcode() {
        "bra" => branch(line),
        "brx" => branch_indexed(line),
        "call" => call(line),
        "ret" => {
            line.flag("uni");
            let op = if line.decoder.in_entry {
                Op::Exit
            } else {
                Op::Return
            };
            line.emit(op, Class::Control, 0)
        }
        "exit" => line.emit(Op::Exit, Class::Control, 0),
        "trap" => line.emit(Op::Trap, Class::Control, 0),
        "barrier" if line.has("cluster") => cluster::barrier(line),
        "bar" | "barrier" => barrier(line),
        // A breakpoint without a debugger, a pause, a profiler's mark.
        _ => {
            while line.take(|_| Some(())).is_some() {}
            line.emit(Op::Nothing, Class::Control, 0)
        }
    }
}

fn branch(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    line.flag("uni");
    let Operand::Name(name) = line.operand(0)? else {
        return Err(line.error("`bra` takes a label"));
    };
    match line.decoder.find(name) {
        Some(Symbol::Label(label)) => line.emit(
            Op::Branch {
                target: label as u32,
            },
            Class::Control,
            0,
        ),
        _ => Err(line.error(format!("there is no label `{name}`"))),
    }
}

fn branch_indexed(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    if !line.flag("idx") {
        return Err(line.unsupported());
    }
    line.flag("uni");
    let index = line.src(0, Type::U32)?;
    let Operand::Name(name) = line.operand(1)? else {
        return Err(line.error("`brx.idx` takes a list of targets"));
    };
    match line.decoder.find(name) {
        Some(Symbol::Targets(number)) => {
            let labels = line.decoder.target_labels(number);
            let targets = labels.iter().map(|&label| label as u32).collect();
            line.emit(Op::BranchIndexed { index, targets }, Class::Control, 0)
        }
        _ => Err(line.error(format!("`{name}` is not a list of targets"))),
    }
}

fn call(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    line.flag("uni");
    let mut index = 0;
    let mut results = Vec::new();
    if let Operand::List(names) = line.operand(0)? {
        results = call_variables(line, names)?;
        index = 1;
    }
    let target = line.operand(index)?;
    let arguments = match line.instruction.operands.get(index + 1) {
        Some((_, Operand::List(names))) => call_variables(line, names)?,
        _ => Vec::new(),
    };
    let function = match target {
        Operand::Name(name) => line.decoder.find(name),
        _ => None,
    };
    let target = match function {
        Some(Symbol::Function(number)) => {
            let function = line.decoder.module_function(number);
            match function.name {
                _ if function.body.is_some() && !function.is_entry => Callee::Function(number),
                "vprintf" => Callee::Print,
                "__assertfail" => Callee::AssertFail,
                name => return Err(line.error(format!("function `{name}` has no body here"))),
            }
        }
        Some(Symbol::Register(Reg::Wide(slot))) => Callee::Pointer(slot),
        _ => return Err(line.error("`call` takes a function")),
    };
    line.emit(
        Op::Call(Box::new(Call {
            target,
            arguments,
            results,
        })),
        Class::Control,
        0,
    )
}

fn call_variables(line: &Line<'_, '_, '_>, names: &[&str]) -> Decoded<Vec<(u32, u32)>> {
    let place = |name: &&str| match line.decoder.find(name) {
        Some(Symbol::Variable {
            space: AddressSpace::Local,
            address,
            bytes,
        }) => Ok((address as u32, bytes as u32)),
        _ => Err(line.error(format!("`{name}` is not a parameter of a call"))),
    };
    names.iter().map(place).collect()
}

fn barrier(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    if line.flag("warp") {
        if !line.flag("sync") {
            return Err(line.unsupported());
        }
        let mask = line.src(0, Type::B32)?;
        let op = Op::Warp {
            mask,
            op: Box::new(WarpOp::Sync),
        };
        return line.emit(op, Class::Synchronization, 0);
    }
    line.flag("cta");
    let kinds = [
        ("sync", BarrierKind::Sync),
        ("arrive", BarrierKind::Arrive),
        ("popc", BarrierKind::Popc),
        ("and", BarrierKind::And),
        ("or", BarrierKind::Or),
    ];
    let reduces = line.flag("red");
    let kind = line.choice(&kinds).ok_or_else(|| line.unsupported())?;
    let aligned = line.opcode() == "bar" || line.has("aligned");
    line.flag("aligned");
    line.optional_ty();
    let first = usize::from(reduces);
    let id = line.src(first, Type::U32)?;
    let (mut threads, mut p, mut d) = (None, TRUE, Reg::Sink);
    if reduces {
        d = line.any_d(0)?;
        let last = line.operand_count() - 1;
        p = line.src(last, Type::Pred)?;
        if last == 3 {
            threads = Some(line.src(2, Type::U32)?);
        }
    } else if line.operand_count() > 1 {
        threads = Some(line.src(1, Type::U32)?);
    }
    let barrier = Barrier {
        kind,
        id,
        threads,
        aligned,
        d,
        p,
    };
    line.emit(Op::Barrier(Box::new(barrier)), Class::Synchronization, 0)
}
