//! The tables: what each opcode with its modifiers means.
//!
//! Chapter numbers are those of the PTX ISA, version 9.0.

mod bits;
mod bulk;
mod cluster;
mod compare;
mod control;
mod convert;
mod float;
mod integer;
mod matrix;
mod mbarrier;
mod memory;
mod moves;
mod warp;
mod wgmma;

use super::line::{Decoded, Line};
use super::types::Type;
use super::*;

/// A function over rows from a function over the values of one lane. The closure captures
/// nothing, so each use is one compiled loop.
macro_rules! row {
    (1, $f:expr) => {
        (|r, o, m| $crate::exec::registers::map1(r, o, m, $f)) as RowFn
    };
    (2, $f:expr) => {
        (|r, o, m| $crate::exec::registers::map2(r, o, m, $f)) as RowFn
    };
    (3, $f:expr) => {
        (|r, o, m| $crate::exec::registers::map3(r, o, m, $f)) as RowFn
    };
    (4, $f:expr) => {
        (|r, o, m| $crate::exec::registers::map4(r, o, m, $f)) as RowFn
    };
    (predicate, $f:expr) => {
        (|r, o, m| $crate::exec::registers::map3_with_predicate(r, o, m, $f)) as RowFn
    };
}
use row;

/// `$body` with `$T` standing for the Rust type of the integer type `$ty`; `None` for others.
macro_rules! for_integer {
    ($ty:expr, $T:ident => $body:expr) => {
        for_integer!(@ $ty, $T => $body, U16 u16, S16 i16, B16 u16, U32 u32, S32 i32, B32 u32,
            U64 u64, S64 i64, B64 u64)
    };
    (@ $ty:expr, $T:ident => $body:expr, $($name:ident $rust:ty),*) => {
        match $ty {
            $(Type::$name => {
                type $T = $rust;
                Some($body)
            })*
            _ => None,
        }
    };
}
use for_integer;

/// As `for_integer`, for floats, with `$P` the pattern to apply to packed pairs.
macro_rules! for_float {
    ($ty:expr, $T:ident => $body:expr) => {
        match $ty {
            Type::F16 => {
                type $T = half::f16;
                Some($body)
            }
            Type::Bf16 => {
                type $T = half::bf16;
                Some($body)
            }
            Type::F32 => {
                type $T = f32;
                Some($body)
            }
            Type::F64 => {
                type $T = f64;
                Some($body)
            }
            _ => None,
        }
    };
}
use for_float;

/// `!p`, as an instruction of its own.
pub(super) fn not_predicate(d: Slot, a: Slot) -> Instr {
    let operands = Operands {
        d,
        a,
        ..Operands::default()
    };
    let row = row!(1, |a: bool, _| !a);
    Instr {
        guard: None,
        op: Op::Alu(row, operands),
        class: Class::Step,
        flops: 0,
    }
}

pub(super) use moves::special_register;

impl Line<'_, '_, '_> {
    /// Operands of types `sources` behind a destination of type `d`.
    fn operands(&mut self, d: Type, sources: &[Type]) -> Decoded<Operands> {
        let mut operands = Operands {
            d: self.d(0, d)?,
            ..Operands::default()
        };
        self.sources(&mut operands, sources)?;
        Ok(operands)
    }

    fn sources(&mut self, operands: &mut Operands, sources: &[Type]) -> Decoded<()> {
        for (index, ty) in sources.iter().enumerate() {
            let slot = self.src(index + 1, *ty)?;
            match index {
                0 => operands.a = slot,
                1 => operands.b = slot,
                2 => operands.c = slot,
                _ => operands.e = slot,
            }
        }
        if self.operand_count() > sources.len() + 1 {
            return Err(self.error(format!("`{}` has too many operands", self.opcode())));
        }
        Ok(())
    }
}

/// Decodes one instruction and appends it.
pub(super) fn decode(mut line: Line<'_, '_, '_>) -> Decoded<()> {
    let line = &mut line;
    match line.opcode() {
        // 9.7.1 integer, 9.7.3 and 9.7.4 floating point share names.
        "add" | "sub" | "mul" | "mad" | "fma" | "div" | "rem" | "abs" | "neg" | "min" | "max"
        | "rcp" | "sqrt" | "rsqrt" | "sin" | "cos" | "lg2" | "ex2" | "tanh" | "copysign"
        | "testp" | "addc" | "subc" | "madc" | "mul24" | "mad24" | "sad" | "dp4a" | "dp2a" => {
            arithmetic(line)
        }
        "and" | "or" | "xor" | "not" | "cnot" | "shl" | "shr" | "shf" | "lop3" | "prmt"
        | "popc" | "clz" | "bfind" | "fns" | "brev" | "bfe" | "bfi" | "bmsk" | "szext" => {
            bits::decode(line)
        }
        "setp" | "set" | "selp" | "slct" => compare::decode(line),
        "cvt" => convert::decode(line),
        "mov" | "cvta" | "isspacep" | "createpolicy" => moves::decode(line),
        "ld" | "ldu" | "st" | "atom" | "red" | "prefetch" | "prefetchu" | "applypriority"
        | "discard" | "membar" | "fence" | "cp" => memory::decode(line),
        "bra" | "brx" | "call" | "ret" | "exit" | "trap" | "brkpt" | "bar" | "barrier"
        | "nanosleep" | "pmevent" => control::decode(line),
        "shfl" | "vote" | "match" | "redux" | "activemask" | "elect" => warp::decode(line),
        "ldmatrix" | "stmatrix" | "movmatrix" | "mma" => matrix::decode(line),
        "mbarrier" => mbarrier::decode(line),
        "wgmma" => wgmma::decode(line),
        "mapa" | "getctarank" | "setmaxnreg" | "griddepcontrol" => cluster::decode(line),
        other => Err(line.error(format!("opcode `{other}` is not modelled"))),
    }
}

fn arithmetic(line: &mut Line<'_, '_, '_>) -> Decoded<()> {
    let float = line
        .instruction
        .modifiers
        .iter()
        .filter_map(|m| Type::parse(m))
        .any(Type::is_float);
    if float {
        float::decode(line)
    } else {
        integer::decode(line)
    }
}
