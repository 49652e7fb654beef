//! 9.7.9.25 bulk and tensor copies.

use super::*;
use crate::syntax::ast::Operand;

/// `cp.async.bulk` and `cp.reduce.async.bulk`; `async` and `bulk` are taken.
pub(super) fn decode(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    if line.flag("commit_group") {
        return line.emit(Op::BulkCommit, Class::Synchronization, 0);
    }
    if line.flag("wait_group") {
        // Reading the sources and writing the targets are one step here.
        line.flag("read");
        let Operand::Int(pending) = line.operand(0)? else {
            return Err(line.error("`cp.async.bulk.wait_group` takes a number"));
        };
        let pending = (*pending).clamp(0, 1 << 20) as u32;
        return line.emit(Op::BulkWait { pending }, Class::Synchronization, 0);
    }
    if line.flag("prefetch") {
        while line.take(|_| Some(())).is_some() {}
        return line.emit(Op::Nothing, Class::Memory, 0);
    }
    let tensor = line.flag("tensor");
    let ranks = [("1d", 1), ("2d", 2), ("3d", 3), ("4d", 4), ("5d", 5)];
    let rank = line.choice(&ranks).unwrap_or(0);
    line.flag("tile");
    line.flag("L2::cache_hint");
    let shared = [("shared::cluster", ()), ("shared::cta", ())];
    let stores = line
        .instruction
        .modifiers
        .iter()
        .find(|m| **m == "global" || m.starts_with("shared"));
    let stores = stores == Some(&"global");
    if !line.flag("global") || line.choice(&shared).is_none() || tensor != (rank > 0) {
        return Err(line.unsupported());
    }
    let copy = if stores {
        store(line, rank)?
    } else {
        load(line, rank)?
    };
    line.emit(Op::BulkCopy(Box::new(copy)), Class::Memory, 0)
}

fn load(line: &mut Line<'_, '_, '_>, rank: usize) -> Decoded<BulkCopy> {
    if line.has("reduce") || !line.flag("mbarrier::complete_tx::bytes") {
        return Err(line.unsupported());
    }
    let multicast = line.flag("multicast::cluster");
    let (_, shared) = memory::address(line, 0, AddressSpace::Shared)?;
    let global = global(line, 1, 2, rank)?;
    let next = if rank > 0 { 2 } else { 3 };
    let (_, barrier) = memory::address(line, next, AddressSpace::Shared)?;
    let blocks = if multicast {
        Some(line.src(next + 1, Type::B16)?)
    } else {
        None
    };
    Ok(BulkCopy {
        shared,
        global,
        kind: BulkKind::Load { barrier, blocks },
    })
}

fn store(line: &mut Line<'_, '_, '_>, rank: usize) -> Decoded<BulkCopy> {
    let reduction = if line.flag("reduce") {
        Some(reduction(line, rank)?)
    } else {
        None
    };
    if !line.flag("bulk_group") {
        return Err(line.unsupported());
    }
    let global = global(line, 0, 2, rank)?;
    let (_, shared) = memory::address(line, 1, AddressSpace::Shared)?;
    Ok(BulkCopy {
        shared,
        global,
        kind: BulkKind::Store { reduction },
    })
}

/// The operation and type of `cp.reduce`. A tensor's type is only known from its map, at run time: not
/// modelled.
fn reduction(line: &mut Line<'_, '_, '_>, rank: usize) -> Decoded<Reduction> {
    const OPERATIONS: [&str; 8] = ["add", "min", "max", "inc", "dec", "and", "or", "xor"];
    let operation = line.take(|m| OPERATIONS.into_iter().find(|name| *name == m));
    line.flag("noftz");
    let (Some(operation), 0) = (operation, rank) else {
        return Err(line.unsupported());
    };
    let ty = line.ty()?;
    let apply = memory::atomic_function(operation, ty).ok_or_else(|| line.unsupported())?;
    Ok(Reduction {
        apply,
        bytes: ty.bits() / 8,
    })
}

/// `[address]` with a number of bytes in operand `size`, or `[map, {x, y}]`.
fn global(
    line: &mut Line<'_, '_, '_>,
    index: usize,
    size: usize,
    rank: usize,
) -> Decoded<BulkGlobal> {
    let (_, address) = memory::address(line, index, AddressSpace::Generic)?;
    let Operand::Address { coordinates, .. } = line.operand(index)? else {
        return Err(line.unsupported());
    };
    if rank != coordinates.len() {
        return Err(line.error(format!(
            "a tensor of {rank} dimensions needs {rank} coordinates"
        )));
    }
    if rank == 0 {
        return Ok(BulkGlobal::Linear {
            address,
            bytes: line.src(size, Type::U32)?,
        });
    }
    let corner = coordinates
        .iter()
        .map(|c| line.value(index, c, Type::S32))
        .collect::<Decoded<Vec<Slot>>>()?;
    Ok(BulkGlobal::Tensor {
        map: address,
        corner,
    })
}
