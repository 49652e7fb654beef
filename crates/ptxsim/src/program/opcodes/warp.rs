//! 9.7.9.6 `shfl` and 9.7.13 `vote`, `match`, `redux`, `activemask`, `elect`.

use super::*;

pub(super) fn decode(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    if line.opcode() == "activemask" {
        line.ty()?;
        let d = line.d(0, Type::B32)?;
        return line.emit(Op::ActiveMask { d }, Class::Integer, 0);
    }
    if !line.flag("sync") {
        return Err(line.unsupported());
    }
    let (op, mask) = match line.opcode() {
        "shfl" => shuffle(line)?,
        "vote" => vote(line)?,
        "match" => matching(line)?,
        "redux" => reduce(line)?,
        _ => elect(line)?,
    };
    let mask = line.src(mask, Type::B32)?;
    line.emit(
        Op::Warp {
            mask,
            op: Box::new(op),
        },
        Class::Synchronization,
        0,
    )
}

fn shuffle(line: &mut Line<'_, '_, '_>) -> Decoded<(WarpOp, usize)> {
    let mode = line.choice(&[
        ("up", ShuffleMode::Up),
        ("down", ShuffleMode::Down),
        ("bfly", ShuffleMode::Butterfly),
        ("idx", ShuffleMode::Index),
    ]);
    let mode = mode.ok_or_else(|| line.unsupported())?;
    line.ty()?;
    let (d, p) = line.pair(0)?;
    let shuffle = Shuffle {
        mode,
        d,
        p: p.unwrap_or(Reg::Sink),
        a: line.src(1, Type::B32)?,
        b: line.src(2, Type::U32)?,
        c: line.src(3, Type::U32)?,
    };
    Ok((WarpOp::Shuffle(shuffle), 4))
}

fn vote(line: &mut Line<'_, '_, '_>) -> Decoded<(WarpOp, usize)> {
    let mode = line.choice(&[
        ("all", VoteMode::All),
        ("any", VoteMode::Any),
        ("uni", VoteMode::Uniform),
        ("ballot", VoteMode::Ballot),
    ]);
    let mode = mode.ok_or_else(|| line.unsupported())?;
    line.ty()?;
    let (d, p) = (line.any_d(0)?, line.src(1, Type::Pred)?);
    Ok((WarpOp::Vote { mode, d, p }, 2))
}

fn matching(line: &mut Line<'_, '_, '_>) -> Decoded<(WarpOp, usize)> {
    let every = line.flag("all");
    if !every && !line.flag("any") {
        return Err(line.unsupported());
    }
    let ty = line.ty()?;
    let (d, all) = line.pair(0)?;
    let Reg::Word(d, 32) = d else {
        return Err(line.error("`match` writes a 32-bit register"));
    };
    let operand = line.operand(1)?;
    let a = line.any_value(1, operand, ty)?;
    Ok((WarpOp::Match { d, all, every, a }, 2))
}

fn reduce(line: &mut Line<'_, '_, '_>) -> Decoded<(WarpOp, usize)> {
    const OPERATIONS: [&str; 6] = ["add", "min", "max", "and", "or", "xor"];
    let operation = line.take(|m| OPERATIONS.into_iter().find(|name| *name == m));
    let ty = line.ty()?;
    let apply: fn(u32, u32) -> u32 = match (operation, ty) {
        (Some("add"), Type::U32 | Type::S32) => u32::wrapping_add,
        (Some("min"), Type::U32) => u32::min,
        (Some("max"), Type::U32) => u32::max,
        (Some("min"), Type::S32) => |a, b| (a as i32).min(b as i32) as u32,
        (Some("max"), Type::S32) => |a, b| (a as i32).max(b as i32) as u32,
        (Some("and"), Type::B32) => |a, b| a & b,
        (Some("or"), Type::B32) => |a, b| a | b,
        (Some("xor"), Type::B32) => |a, b| a ^ b,
        _ => return Err(line.unsupported()),
    };
    Ok((
        WarpOp::Redux {
            d: line.d(0, ty)?,
            a: line.src(1, ty)?,
            apply,
        },
        2,
    ))
}

fn elect(line: &mut Line<'_, '_, '_>) -> Decoded<(WarpOp, usize)> {
    match line.pair(0)? {
        (d, Some(Reg::Predicate(p))) => Ok((WarpOp::Elect { d, p }, 1)),
        _ => Err(line.error("`elect.sync` writes `d|p`")),
    }
}
