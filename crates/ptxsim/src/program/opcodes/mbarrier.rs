//! 9.7.13.15 `mbarrier`.

use super::*;

pub(super) fn decode(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    const OPERATIONS: [&str; 8] = [
        "init",
        "inval",
        "expect_tx",
        "complete_tx",
        "arrive",
        "arrive_drop",
        "test_wait",
        "try_wait",
    ];
    let operation = line.take(|m| OPERATIONS.into_iter().find(|name| *name == m));
    // What a barrier orders, it orders for everybody here.
    line.choice(&[("acquire", ()), ("release", ()), ("relaxed", ())]);
    line.choice(&[("cta", ()), ("cluster", ())]);
    let space = memory::space(line);
    let (index, operation) = match operation {
        Some("init") => (
            0,
            MbarrierOperation::Init {
                count: line.src(1, Type::U32)?,
            },
        ),
        Some("inval") => (0, MbarrierOperation::Invalidate),
        Some("expect_tx") => (0, MbarrierOperation::ExpectBytes(line.src(1, Type::U32)?)),
        Some("complete_tx") => (0, MbarrierOperation::CompleteBytes(line.src(1, Type::U32)?)),
        Some(name @ ("arrive" | "arrive_drop")) => (1, arrive(line, name == "arrive_drop")?),
        Some(name @ ("test_wait" | "try_wait")) => (1, wait(line, name == "try_wait")?),
        _ => return Err(line.unsupported()),
    };
    if line.ty()? != Type::B64 {
        return Err(line.unsupported());
    }
    let (space, address) = memory::address(line, index, space)?;
    let mbarrier = MbarrierOp {
        space,
        address,
        operation,
    };
    line.emit(Op::Mbarrier(Box::new(mbarrier)), Class::Synchronization, 0)
}

fn arrive(line: &mut Line<'_, '_, '_>, drop: bool) -> Decoded<MbarrierOperation> {
    let expects = line.flag("expect_tx");
    line.flag("noComplete");
    let state = line.any_d(0)?;
    let value = if line.operand_count() > 2 {
        Some(line.src(2, Type::U32)?)
    } else {
        None
    };
    let (count, bytes) = if expects {
        (None, value)
    } else {
        (value, None)
    };
    match state {
        Reg::Wide(_) | Reg::Sink => Ok(MbarrierOperation::Arrive {
            state,
            count,
            bytes,
            drop,
        }),
        _ => Err(line.error("the state of a barrier is a 64-bit register")),
    }
}

fn wait(line: &mut Line<'_, '_, '_>, blocking: bool) -> Decoded<MbarrierOperation> {
    let phase = if line.flag("parity") {
        MbarrierPhase::Parity(line.src(2, Type::U32)?)
    } else {
        MbarrierPhase::State(line.src(2, Type::B64)?)
    };
    let done = line.d(0, Type::Pred)?;
    Ok(MbarrierOperation::Wait {
        done,
        phase,
        blocking,
    })
}

/// 9.7.13.15.13 `cp.async.mbarrier.arrive`; `async` is taken.
pub(super) fn arrive_after_copies(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    line.flag("mbarrier");
    if !line.flag("arrive") {
        return Err(line.unsupported());
    }
    let counted = line.flag("noinc");
    let space = memory::space(line);
    if line.ty()? != Type::B64 {
        return Err(line.unsupported());
    }
    let (space, address) = memory::address(line, 0, space)?;
    let operation = MbarrierOperation::ArriveAfterCopies { counted };
    let mbarrier = MbarrierOp {
        space,
        address,
        operation,
    };
    line.emit(Op::Mbarrier(Box::new(mbarrier)), Class::Synchronization, 0)
}
