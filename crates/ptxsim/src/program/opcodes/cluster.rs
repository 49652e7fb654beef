//! 9.7.13 and 9.7.9 for clusters: `barrier.cluster`, `mapa`, `getctarank`; `setmaxnreg`,
//! `griddepcontrol`.

use super::*;
use crate::syntax::ast::Operand;

/// `barrier.cluster`
pub(super) fn barrier(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    line.flag("cluster");
    line.choice(&[("acquire", ()), ("release", ()), ("relaxed", ())]);
    let aligned = line.flag("aligned");
    let op = match line.choice(&[("arrive", false), ("wait", true)]) {
        Some(false) => Op::ClusterArrive { aligned },
        Some(true) => Op::ClusterWait { aligned },
        None => return Err(line.unsupported()),
    };
    line.emit(op, Class::Synchronization, 0)
}

pub(super) fn decode(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    match line.opcode() {
        "mapa" => {
            memory::space(line);
            let ty = line.ty()?;
            let (d, a) = (line.any_d(0)?, line.any_parts(1, ty)?);
            let rank = line.src(2, Type::U32)?;
            line.emit(Op::MapAddress { d, a: a[0], rank }, Class::Integer, 0)
        }
        "getctarank" => {
            memory::space(line);
            let ty = line.ty()?;
            let (d, a) = (line.any_d(0)?, line.any_parts(1, ty)?);
            line.emit(Op::RankOfAddress { d, a: a[0] }, Class::Integer, 0)
        }
        // How many registers a thread may use changes no result.
        "setmaxnreg" => {
            let direction = line.choice(&[("inc", ()), ("dec", ())]);
            let aligned = line.flag("sync") && line.flag("aligned");
            let Operand::Int(count) = line.operand(0)? else {
                return Err(line.error("`setmaxnreg` takes a number"));
            };
            if direction.is_none() || !aligned || line.ty()? != Type::U32 {
                return Err(line.unsupported());
            }
            if !(24..=256).contains(count) || count % 8 != 0 {
                return Err(line.error("the register count is a multiple of 8 from 24 to 256"));
            }
            line.emit(Op::Nothing, Class::Control, 0)
        }
        // `griddepcontrol`: launches run one after the other here.
        _ => {
            line.choice(&[("launch_dependents", ()), ("wait", ())]);
            line.emit(Op::Nothing, Class::Synchronization, 0)
        }
    }
}
