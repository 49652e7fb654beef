//! 9.7.9 loads, stores and asynchronous copies; 9.7.13 fences and atomics.

use super::*;
use crate::syntax::ast::Operand;

pub(super) fn decode(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    match line.opcode() {
        "ld" | "ldu" => load(line),
        "st" => store(line),
        "atom" | "red" => atomic(line),
        "membar" | "fence" => fence(line),
        "cp" => copy(line),
        // Hints.
        _ => {
            while line.take(|_| Some(())).is_some() {}
            line.emit(Op::Nothing, Class::Memory, 0)
        }
    }
}

pub(super) fn space(line: &mut Line<'_, '_, '_>) -> AddressSpace {
    line.take(|modifier| {
        Some(match modifier {
            "global" | "const" => AddressSpace::Global,
            "shared" | "shared::cta" | "shared::cluster" => AddressSpace::Shared,
            "local" => AddressSpace::Local,
            "param" | "param::entry" | "param::func" => AddressSpace::Param,
            _ => return None,
        })
    })
    .unwrap_or(AddressSpace::Generic)
}

fn ordering(line: &mut Line<'_, '_, '_>) -> Ordering {
    let scope = |m: &str| matches!(m, "cta" | "cluster" | "gpu" | "sys").then_some(());
    let table = [
        ("weak", Ordering::default()),
        (
            "volatile",
            Ordering {
                strong: true,
                ..Ordering::default()
            },
        ),
        (
            "relaxed",
            Ordering {
                strong: true,
                ..Ordering::default()
            },
        ),
        (
            "mmio",
            Ordering {
                strong: true,
                ..Ordering::default()
            },
        ),
        (
            "acquire",
            Ordering {
                strong: true,
                acquire: true,
                release: false,
            },
        ),
        (
            "release",
            Ordering {
                strong: true,
                acquire: false,
                release: true,
            },
        ),
        (
            "acq_rel",
            Ordering {
                strong: true,
                acquire: true,
                release: true,
            },
        ),
    ];
    let ordering = line.choice(&table).unwrap_or_default();
    line.take(scope);
    ordering
}

/// Cache operators and eviction hints change no result.
fn hints(line: &mut Line<'_, '_, '_>) {
    let hint = |m: &str| {
        let known = matches!(
            m,
            "ca" | "cg" | "cs" | "lu" | "cv" | "wb" | "wt" | "nc" | "unified"
        ) || m.starts_with("L1::")
            || m.starts_with("L2::");
        known.then_some(())
    };
    while line.take(hint).is_some() {}
}

fn vector(line: &mut Line<'_, '_, '_>) -> usize {
    line.choice(&[("v2", 2), ("v4", 4), ("v8", 8)]).unwrap_or(1)
}

/// The address of operand `index`; the variable that it names decides between a kernel's
/// parameters and the parameters of calls, which live in local memory.
pub(super) fn address(
    line: &mut Line<'_, '_, '_>,
    index: usize,
    space: AddressSpace,
) -> Decoded<(AddressSpace, Address)> {
    let (address, own) = line.address(index)?;
    let space = match (space, own) {
        (AddressSpace::Param, Some(own)) => own,
        (space, _) => space,
    };
    Ok((space, address))
}

/// Checks that `count` registers of `bytes` bytes are an access that PTX has.
fn check_vector(line: &Line<'_, '_, '_>, given: usize, count: usize, ty: Type) -> Decoded<()> {
    if given != count || count as u32 * ty.bits() > 256 || ty.bits() < 8 || ty.bits() > 64 {
        return Err(line.unsupported());
    }
    Ok(())
}

fn load(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let ordering = ordering(line);
    let space = space(line);
    hints(line);
    let count = vector(line);
    let ty = line.ty()?;
    let to = line.d_parts(0)?;
    check_vector(line, to.len(), count, ty)?;
    check_widths(line, &to, ty)?;
    let (space, address) = address(line, 1, space)?;
    let load = Load {
        space,
        address,
        element_bytes: ty.bits() / 8,
        signed: ty.is_signed(),
        to,
        ordering,
    };
    line.emit(Op::Load(Box::new(load)), Class::Memory, 0)
}

/// Registers may be wider than the elements in memory, not narrower.
fn check_widths(line: &Line<'_, '_, '_>, registers: &[Reg], ty: Type) -> Decoded<()> {
    let fits = |reg: &Reg| match reg {
        Reg::Sink => true,
        Reg::Word(_, bits) => u32::from(*bits) >= ty.bits(),
        Reg::Wide(_) => true,
        Reg::Predicate(_) => false,
    };
    if registers.iter().all(fits) {
        Ok(())
    } else {
        Err(line.error(format!("a register is narrower than `.{}`", ty.name())))
    }
}

fn store(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let ordering = ordering(line);
    let space = space(line);
    hints(line);
    let count = vector(line);
    let ty = line.ty()?;
    let from = line.any_parts(1, ty)?;
    check_vector(line, from.len(), count, ty)?;
    check_widths(line, &from, ty)?;
    let (space, address) = address(line, 0, space)?;
    let store = Store {
        space,
        address,
        element_bytes: ty.bits() / 8,
        from,
        ordering,
    };
    line.emit(Op::Store(Box::new(store)), Class::Memory, 0)
}

fn fence(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    if line.flag("proxy") {
        return proxy_fence(line);
    }
    line.flag("mbarrier_init");
    line.choice(&[
        ("sc", ()),
        ("acq_rel", ()),
        ("acquire", ()),
        ("release", ()),
    ]);
    let device = line.choice(&[
        ("cta", false),
        ("cluster", false),
        ("gpu", true),
        ("gl", true),
        ("sys", true),
    ]);
    let device = device.ok_or_else(|| line.unsupported())?;
    line.emit(Op::Fence { device }, Class::Synchronization, 0)
}

/// Of the proxies only the asynchronous one is told apart; the others see memory as it is.
fn proxy_fence(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let orders_async = line.has("async");
    line.choice(&[("async", ()), ("alias", ()), ("tensormap::generic", ())]);
    line.choice(&[("acquire", ()), ("release", ())]);
    line.choice(&[("cta", ()), ("cluster", ()), ("gpu", ()), ("sys", ())]);
    line.choice(&[("global", ()), ("shared::cta", ()), ("shared::cluster", ())]);
    let op = if orders_async {
        Op::ProxyFence
    } else {
        Op::Nothing
    };
    line.emit(op, Class::Synchronization, 0)
}

/// An operation on 32- or 64-bit integers as one on the low bits of 64.
macro_rules! atomic_fn {
    ($T:ty, |$old:ident, $b:ident| $body:expr) => {
        (|old: u64, b: u64, _c: u64| {
            let ($old, $b) = (old as $T, b as $T);
            ($body) as u64
        }) as AtomicFn
    };
}

fn atomic_add_float<F: crate::arith::float::Float>(old: u64, b: u64) -> u64 {
    let mode = crate::arith::float::Mode::RN;
    crate::arith::float::add(F::of_bits(old), F::of_bits(b), mode).bits()
}

/// Adds both halves.
fn atomic_add_packed<F: crate::arith::float::Float>(old: u64, b: u64) -> u64 {
    let half = |shift: u32| atomic_add_float::<F>(old >> shift & 0xffff, b >> shift & 0xffff);
    half(0) | half(16) << 16
}

pub(super) fn atomic_function(operation: &str, ty: Type) -> Option<AtomicFn> {
    use half::{bf16, f16};
    let wide = ty.bits() == 64;
    Some(match (operation, ty) {
        ("add", Type::F32) => |old, b, _| atomic_add_float::<f32>(old, b),
        ("add", Type::F64) => |old, b, _| atomic_add_float::<f64>(old, b),
        ("add", Type::F16) => |old, b, _| atomic_add_float::<f16>(old, b),
        ("add", Type::Bf16) => |old, b, _| atomic_add_float::<bf16>(old, b),
        ("add", Type::F16x2) => |old, b, _| atomic_add_packed::<f16>(old, b),
        ("add", Type::Bf16x2) => |old, b, _| atomic_add_packed::<bf16>(old, b),
        ("add", Type::U32 | Type::S32 | Type::U64 | Type::S64) => |old, b, _| old.wrapping_add(b),
        ("min", Type::U32) => atomic_fn!(u32, |old, b| old.min(b)),
        ("max", Type::U32) => atomic_fn!(u32, |old, b| old.max(b)),
        ("min", Type::S32) => atomic_fn!(i32, |old, b| old.min(b)),
        ("max", Type::S32) => atomic_fn!(i32, |old, b| old.max(b)),
        ("min", Type::U64) => atomic_fn!(u64, |old, b| old.min(b)),
        ("max", Type::U64) => atomic_fn!(u64, |old, b| old.max(b)),
        ("min", Type::S64) => atomic_fn!(i64, |old, b| old.min(b)),
        ("max", Type::S64) => atomic_fn!(i64, |old, b| old.max(b)),
        ("inc", Type::U32) => {
            atomic_fn!(u32, |old, b| if old >= b { 0 } else { old.wrapping_add(1) })
        }
        ("dec", Type::U32) => {
            atomic_fn!(u32, |old, b| if old == 0 || old > b {
                b
            } else {
                old.wrapping_sub(1)
            })
        }
        ("and", _) => |old, b, _| old & b,
        ("or", _) => |old, b, _| old | b,
        ("xor", _) => |old, b, _| old ^ b,
        ("exch", _) => |_, b, _| b,
        ("cas", _) if wide => |old, b, c| if old == b { c } else { old },
        ("cas", _) if ty.bits() == 32 => |old, b, c| if old as u32 == b as u32 { c } else { old },
        ("cas", Type::B16) => |old, b, c| if old as u16 == b as u16 { c } else { old },
        _ => return None,
    })
}

fn atomic(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    const OPERATIONS: [&str; 10] = [
        "add", "min", "max", "inc", "dec", "and", "or", "xor", "exch", "cas",
    ];
    let mut ordering = ordering(line);
    ordering.strong = true;
    let space = space(line);
    let operation = line.take(|m| OPERATIONS.into_iter().find(|name| *name == m));
    let operation = operation.ok_or_else(|| line.unsupported())?;
    line.flag("noftz");
    hints(line);
    let count = vector(line);
    let ty = line.ty()?;
    let apply = atomic_function(operation, ty).ok_or_else(|| line.unsupported())?;
    let reduces = line.opcode() == "red";
    let first = usize::from(!reduces);
    let (space, address) = address(line, first, space)?;
    let b = line.any_parts(first + 1, ty)?;
    let c = if operation == "cas" {
        let operand = line.operand(first + 2)?;
        line.any_value(first + 2, operand, ty)?
    } else {
        Reg::Sink
    };
    let d = if reduces {
        vec![Reg::Sink; count]
    } else {
        line.d_parts(0)?
    };
    if d.len() != count || b.len() != count {
        return Err(line.unsupported());
    }
    check_widths(line, &d, ty)?;
    let flops = if ty.is_float() {
        ty.packed() * count as u32
    } else {
        0
    };
    let atomic = Atomic {
        space,
        address,
        bytes: ty.bits() / 8,
        apply,
        d,
        b,
        c,
        ordering,
    };
    line.emit(Op::Atomic(Box::new(atomic)), Class::Memory, flops)
}

/// `cp.async`
fn copy(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    if line.has("bulk") && line.flag("async") {
        line.flag("bulk");
        return bulk::decode(line);
    }
    if line.has("mbarrier") && line.flag("async") {
        return mbarrier::arrive_after_copies(line);
    }
    if !line.flag("async") {
        return Err(line.unsupported());
    }
    if line.flag("commit_group") {
        return line.emit(Op::AsyncCommit, Class::Synchronization, 0);
    }
    if line.flag("wait_all") {
        return line.emit(Op::AsyncWait { pending: None }, Class::Synchronization, 0);
    }
    if line.flag("wait_group") {
        let Operand::Int(pending) = line.operand(0)? else {
            return Err(line.error("`cp.async.wait_group` takes a number"));
        };
        let pending = Some((*pending).clamp(0, 1 << 20) as u32);
        return line.emit(Op::AsyncWait { pending }, Class::Synchronization, 0);
    }
    hints(line);
    if space(line) != AddressSpace::Shared || space(line) != AddressSpace::Global {
        return Err(line.unsupported());
    }
    hints(line);
    let (to, from) = (line.address(0)?.0, line.address(1)?.0);
    let bytes = match line.operand(2)? {
        Operand::Int(bytes @ (4 | 8 | 16)) => *bytes as u32,
        _ => return Err(line.error("`cp.async` copies 4, 8 or 16 bytes")),
    };
    let (mut source_bytes, mut ignore_source) = (None, None);
    if line.operand_count() > 3 {
        let operand = line.operand(3)?;
        let is_predicate = match operand {
            Operand::Not(_) => true,
            Operand::Name(_) => {
                matches!(line.register(3, operand), Ok(Reg::Predicate(_)))
            }
            _ => false,
        };
        let is_wide = matches!(line.register(3, operand), Ok(Reg::Wide(_)));
        if is_predicate {
            ignore_source = Some(line.src(3, Type::Pred)?);
        } else if !is_wide {
            source_bytes = Some(line.src(3, Type::U32)?);
        }
    }
    let copy = AsyncCopy {
        to,
        from,
        bytes,
        source_bytes,
        ignore_source,
    };
    line.emit(Op::AsyncCopy(Box::new(copy)), Class::Memory, 0)
}
