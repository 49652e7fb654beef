//! 9.7.9 `mov`, `cvta`, `isspacep`, and the special registers of chapter 10.

use super::*;
use crate::memory::Window;
use crate::syntax::ast::Operand;

pub(in super::super) fn special_register(name: &str) -> Option<SpecialRegister> {
    use SpecialRegister::*;
    let (stem, axis) = match name.rsplit_once('.') {
        Some((stem, "x")) => (stem, 0),
        Some((stem, "y")) => (stem, 1),
        Some((stem, "z")) => (stem, 2),
        _ => (name, 0),
    };
    Some(match stem {
        "%tid" => Tid(axis),
        "%ntid" => Ntid(axis),
        "%ctaid" => Ctaid(axis),
        "%nctaid" => Nctaid(axis),
        "%clusterid" => ClusterId(axis),
        "%nclusterid" => Nclusterid(axis),
        "%cluster_ctaid" => ClusterCtaid(axis),
        "%cluster_nctaid" => ClusterNctaid(axis),
        "%cluster_ctarank" => ClusterCtaRank,
        "%cluster_nctarank" => ClusterNctaRank,
        "%is_explicit_cluster" => IsExplicitCluster,
        "%laneid" => LaneId,
        "%warpid" => WarpId,
        "%nwarpid" => Nwarpid,
        "%smid" => SmId,
        "%nsmid" => Nsmid,
        "%gridid" => GridId,
        "%lanemask_eq" => LaneMaskEq,
        "%lanemask_le" => LaneMaskLe,
        "%lanemask_lt" => LaneMaskLt,
        "%lanemask_ge" => LaneMaskGe,
        "%lanemask_gt" => LaneMaskGt,
        "%clock" | "%clock64" | "%globaltimer" | "%clock_hi" | "%globaltimer_lo" => Clock,
        "%dynamic_smem_size" => DynamicSharedSize,
        "%total_smem_size" => TotalSharedSize,
        _ => return None,
    })
}

pub(super) fn decode(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    match line.opcode() {
        "mov" => mov(line),
        "cvta" => convert_address(line),
        "isspacep" => is_space(line),
        // A cache policy changes no result: any value will do.
        _ => {
            while line.take(|_| Some(())).is_some() {}
            let operands = Operands {
                d: line.d(0, Type::B64)?,
                a: line.decoder.wide_constant(0),
                ..Operands::default()
            };
            line.alu(row!(1, |a: u64, _| a), operands, Class::Integer, 0)
        }
    }
}

fn mov(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let ty = line.ty()?;
    match (line.operand(0)?, line.operand(1)?) {
        (Operand::Vector(_), _) => {
            let parts = line.d_parts(0)?;
            check_parts(line, &parts, ty)?;
            let whole = line.src(1, ty)?;
            let parts = Parts {
                whole,
                whole_bits: ty.bits(),
                parts,
            };
            line.emit(Op::Unpack(Box::new(parts)), Class::Integer, 0)
        }
        (_, Operand::Vector(list)) => {
            let part_bits = ty.bits() / list.len().max(1) as u32;
            let part = match part_bits {
                8 => Type::B8,
                16 => Type::B16,
                32 => Type::B32,
                _ => return Err(line.unsupported()),
            };
            let parts: Vec<Reg> = line
                .src_parts(1, part)?
                .iter()
                .map(|&s| Reg::Word(s, part_bits as u8))
                .collect();
            check_parts(line, &parts, ty)?;
            let whole = line.d(0, ty)?;
            let parts = Parts {
                whole,
                whole_bits: ty.bits(),
                parts,
            };
            line.emit(Op::Pack(Box::new(parts)), Class::Integer, 0)
        }
        _ => {
            let row = match ty.bits() {
                1 => row!(1, |a: bool, _| a),
                64 => row!(1, |a: u64, _| a),
                16 | 32 => row!(1, |a: u32, _| a),
                _ => return Err(line.unsupported()),
            };
            let operands = line.operands(ty, &[ty])?;
            line.alu(row, operands, Class::Integer, 0)
        }
    }
}

fn check_parts(line: &Line<'_, '_, '_>, parts: &[Reg], whole: Type) -> Decoded<()> {
    let part_bits = whole.bits() / parts.len().max(1) as u32;
    let fits = |part: &Reg| match part {
        Reg::Sink => true,
        Reg::Word(_, bits) => u32::from(*bits) == part_bits,
        _ => false,
    };
    let sizes = matches!(
        (whole.bits(), parts.len()),
        (16, 2) | (32, 2 | 4) | (64, 2 | 4)
    );
    if sizes && parts.iter().all(fits) {
        Ok(())
    } else {
        Err(line.error("the parts do not fill the register"))
    }
}

/// The first generic address of a state space's window.
fn window(space: &str) -> Option<u64> {
    Some(match space {
        "global" | "const" => 0,
        "shared" | "shared::cta" | "shared::cluster" => Window::SHARED,
        "local" => Window::LOCAL,
        "param" | "param::entry" => Window::PARAM,
        _ => return None,
    })
}

fn convert_address(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let to = line.flag("to");
    let base = line.take(window).ok_or_else(|| line.unsupported())?;
    let ty = line.ty()?;
    if ty.bits() != 64 {
        return Err(line.unsupported());
    }
    let mut operands = line.operands(ty, &[ty])?;
    operands.b = line.decoder.wide_constant(base);
    let row = if to {
        row!(2, |a: u64, b: u64, _| a & !b)
    } else {
        row!(2, |a: u64, b: u64, _| a | b)
    };
    line.alu(row, operands, Class::Integer, 0)
}

fn is_space(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let base = line.take(window).ok_or_else(|| line.unsupported())?;
    let mut operands = line.operands(Type::Pred, &[Type::B64])?;
    operands.b = line.decoder.wide_constant(base);
    let row = row!(2, |a: u64, base: u64, _| match Window::of(a) {
        Window::Global => base == 0,
        Window::Shared => base == Window::SHARED,
        Window::Local => base == Window::LOCAL,
        Window::Param => base == Window::PARAM,
        Window::Host => false,
    });
    line.alu(row, operands, Class::Integer, 0)
}
