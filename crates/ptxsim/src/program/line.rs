//! One instruction while it is decoded: its modifiers and operands, each looked up once.

use super::decoder::{Decoder, FALSE, Symbol, TRUE};
use super::types::Type;
use super::*;
use crate::syntax::LoadError;
use crate::syntax::ast::{Base, Instruction, Operand};

pub(super) type Decoded<T> = Result<T, LoadError>;

pub(super) struct Line<'d, 'm, 'a> {
    pub decoder: &'d mut Decoder<'m, 'a>,
    pub instruction: &'m Instruction<'a>,
    guard: Option<Guard>,
    /// Which modifiers have been understood.
    used: Vec<bool>,
}

impl<'d, 'm, 'a> Line<'d, 'm, 'a> {
    pub fn new(
        decoder: &'d mut Decoder<'m, 'a>,
        instruction: &'m Instruction<'a>,
    ) -> Decoded<Line<'d, 'm, 'a>> {
        let guard = match instruction.guard {
            None => None,
            Some((name, negated)) => match decoder.find(name) {
                Some(Symbol::Register(Reg::Predicate(predicate))) => {
                    Some(Guard { predicate, negated })
                }
                _ => {
                    let message = format!("`{name}` is not a predicate");
                    return Err(decoder.error(instruction.at, message));
                }
            },
        };
        let used = vec![false; instruction.modifiers.len()];
        Ok(Line {
            decoder,
            instruction,
            guard,
            used,
        })
    }

    pub fn opcode(&self) -> &'a str {
        self.instruction.opcode
    }

    pub fn error(&self, message: impl Into<String>) -> LoadError {
        self.decoder.error(self.instruction.at, message)
    }

    fn operand_error(&self, index: usize, message: impl Into<String>) -> LoadError {
        let at = self
            .instruction
            .operands
            .get(index)
            .map_or(self.instruction.at, |(at, _)| *at);
        self.decoder.error(at, message)
    }

    // ---- modifiers ----

    /// Takes the modifier `name` if it is there.
    pub fn flag(&mut self, name: &str) -> bool {
        self.take(|modifier| (modifier == name).then_some(()))
            .is_some()
    }

    /// Takes the first modifier that `f` understands.
    pub fn take<T>(&mut self, f: impl Fn(&str) -> Option<T>) -> Option<T> {
        for (modifier, used) in self.instruction.modifiers.iter().zip(&mut self.used) {
            if !*used && let Some(value) = f(modifier) {
                *used = true;
                return Some(value);
            }
        }
        None
    }

    /// Takes the first modifier that is in `table`.
    pub fn choice<T: Copy>(&mut self, table: &[(&str, T)]) -> Option<T> {
        self.take(|modifier| {
            table
                .iter()
                .find(|(name, _)| *name == modifier)
                .map(|(_, v)| *v)
        })
    }

    /// Takes the next type.
    pub fn ty(&mut self) -> Decoded<Type> {
        self.take(Type::parse)
            .ok_or_else(|| self.error(format!("`{}` needs a type", self.opcode())))
    }

    /// Takes the next type if there is one.
    pub fn optional_ty(&mut self) -> Option<Type> {
        self.take(Type::parse)
    }

    /// Whether any modifier starts with `prefix`; it is not taken.
    pub fn has(&self, name: &str) -> bool {
        self.instruction.modifiers.contains(&name)
    }

    /// The error for a combination that is not in the tables.
    pub fn unsupported(&self) -> LoadError {
        let modifiers = self.instruction.modifiers.join(".");
        let dot = if modifiers.is_empty() { "" } else { "." };
        self.error(format!(
            "`{}{dot}{modifiers}` is not modelled",
            self.opcode()
        ))
    }

    fn check_modifiers(&self) -> Decoded<()> {
        let unknown = self
            .instruction
            .modifiers
            .iter()
            .zip(&self.used)
            .find(|(_, used)| !**used);
        match unknown {
            None => Ok(()),
            Some((modifier, _)) => Err(self.error(format!(
                "modifier `.{modifier}` of `{}` is not modelled",
                self.opcode()
            ))),
        }
    }

    // ---- operands ----

    pub fn operand_count(&self) -> usize {
        self.instruction.operands.len()
    }

    pub fn operand(&self, index: usize) -> Decoded<&'m Operand<'a>> {
        match self.instruction.operands.get(index) {
            Some((_, operand)) => Ok(operand),
            None => Err(self.error(format!("`{}` needs operand {}", self.opcode(), index + 1))),
        }
    }

    /// A register to write to, of exactly the width of `ty`.
    pub fn d(&mut self, index: usize, ty: Type) -> Decoded<Slot> {
        let operand = self.operand(index)?;
        let reg = match operand {
            Operand::Name("_") => self.decoder.new_registers(ty, 1),
            _ => self.register(index, operand)?,
        };
        match (reg, ty.bits()) {
            (Reg::Predicate(slot), 1) | (Reg::Wide(slot), 64) => Ok(slot),
            (Reg::Word(slot, bits), want) if u32::from(bits) == want => Ok(slot),
            // 8-bit values live in 16-bit registers.
            (Reg::Word(slot, 16), 8) => Ok(slot),
            _ => Err(self.width_error(index, ty)),
        }
    }

    fn width_error(&self, index: usize, ty: Type) -> LoadError {
        let message = format!("this register does not have the width of `.{}`", ty.name());
        self.operand_error(index, message)
    }

    /// A register of any width to write to.
    pub fn any_d(&mut self, index: usize) -> Decoded<Reg> {
        let operand = self.operand(index)?;
        self.register(index, operand)
    }

    /// `d` and `p` of `d|p`; `p` is absent in plain `d`.
    pub fn pair(&mut self, index: usize) -> Decoded<(Reg, Option<Reg>)> {
        let operand = self.operand(index)?;
        match operand {
            Operand::Pair(first, second) => {
                let first = self.register(index, &Operand::Name(first))?;
                Ok((first, Some(self.register(index, &Operand::Name(second))?)))
            }
            _ => Ok((self.register(index, operand)?, None)),
        }
    }

    pub fn register(&self, index: usize, operand: &Operand<'a>) -> Decoded<Reg> {
        match operand {
            Operand::Name("_") => Ok(Reg::Sink),
            Operand::Name(name) => match self.decoder.find(name) {
                Some(Symbol::Register(reg)) => Ok(reg),
                _ => Err(self.operand_error(index, format!("`{name}` is not a register"))),
            },
            _ => Err(self.operand_error(index, "expected a register here")),
        }
    }

    /// A value to read, of exactly the width of `ty`.
    pub fn src(&mut self, index: usize, ty: Type) -> Decoded<Slot> {
        let operand = self.operand(index)?;
        self.value(index, operand, ty)
    }

    /// As [`src`](Line::src), for one of the parts of an operand.
    pub fn value(&mut self, index: usize, operand: &Operand<'a>, ty: Type) -> Decoded<Slot> {
        if let Operand::Name(name) = operand
            && name.starts_with('%')
            && self.decoder.find(name).is_none()
        {
            return self.special(index, name, ty);
        }
        if ty.bits() == 1 {
            return self.predicate_value(index, operand);
        }
        if let Some(bits) = self.immediate(index, operand, ty)? {
            return Ok(if ty.bits() == 64 {
                self.decoder.wide_constant(bits)
            } else {
                self.decoder.word_constant(bits as u32)
            });
        }
        match (self.register(index, operand)?, ty.bits()) {
            (Reg::Wide(slot), 64) => Ok(slot),
            (Reg::Word(slot, bits), want) if u32::from(bits) == want => Ok(slot),
            (Reg::Word(slot, _), 8) => Ok(slot),
            _ => Err(self.width_error(index, ty)),
        }
    }

    fn predicate_value(&mut self, index: usize, operand: &Operand<'a>) -> Decoded<Slot> {
        match operand {
            Operand::Int(value) => Ok(if *value == 0 { FALSE } else { TRUE }),
            Operand::Not(name) => {
                let a = self.predicate_value(index, &Operand::Name(name))?;
                let d = self.decoder.new_predicate();
                self.emit_extra(opcodes::not_predicate(d, a));
                Ok(d)
            }
            _ => match self.register(index, operand)? {
                Reg::Predicate(slot) => Ok(slot),
                _ => Err(self.operand_error(index, "expected a predicate here")),
            },
        }
    }

    /// The bits of an operand that is known before the launch.
    fn immediate(&self, index: usize, operand: &Operand<'a>, ty: Type) -> Decoded<Option<u64>> {
        let address = |name: &str, offset: i64| match self.decoder.find(name) {
            Some(Symbol::Variable { address, .. }) => Some(address.wrapping_add_signed(offset)),
            Some(Symbol::Function(number)) => Some(FUNCTION_TAG | number as u64),
            _ => None,
        };
        let bits = match operand {
            Operand::Int(value) => {
                let bits = *value as u64;
                match ty.bits() {
                    64 => bits,
                    width => bits & ((1 << width) - 1),
                }
            }
            Operand::F32(bits) => u64::from(*bits),
            Operand::F64(bits) => match ty {
                Type::F32 => (f64::from_bits(*bits) as f32).to_bits().into(),
                _ => *bits,
            },
            Operand::Name("WARP_SZ") => 32,
            Operand::Name(name) => return Ok(address(name, 0)),
            Operand::Sum(name, offset) => {
                let message = format!("`{name}` is not a variable");
                return address(name, *offset)
                    .map(Some)
                    .ok_or_else(|| self.operand_error(index, message));
            }
            _ => return Ok(None),
        };
        Ok(Some(bits))
    }

    /// Reads a special register into a new one before the instruction.
    fn special(&mut self, index: usize, name: &str, ty: Type) -> Decoded<Slot> {
        let Some(register) = opcodes::special_register(name) else {
            return Err(self.operand_error(index, format!("there is no register `{name}`")));
        };
        let d = self.decoder.new_registers(ty, 1);
        let op = Op::Special { d, register };
        self.emit_extra(Instr {
            guard: None,
            op,
            class: Class::Step,
            flops: 0,
        });
        match d {
            Reg::Word(slot, _) | Reg::Wide(slot) | Reg::Predicate(slot) => Ok(slot),
            Reg::Sink => Err(self.operand_error(index, "expected a value here")),
        }
    }

    /// The parts of `{a, b}`, or the operand alone.
    pub fn parts(&self, index: usize) -> Decoded<&'m [Operand<'a>]> {
        Ok(match self.operand(index)? {
            Operand::Vector(parts) => parts,
            single => std::slice::from_ref(single),
        })
    }

    /// The registers of `{a, b}` that are written.
    pub fn d_parts(&mut self, index: usize) -> Decoded<Vec<Reg>> {
        self.parts(index)?
            .iter()
            .map(|part| self.register(index, part))
            .collect()
    }

    /// The values of `{a, b}`, each of the width of `ty`.
    pub fn src_parts(&mut self, index: usize, ty: Type) -> Decoded<Vec<Slot>> {
        self.parts(index)?
            .iter()
            .map(|part| self.value(index, part, ty))
            .collect()
    }

    /// The values of `{a, b}` as registers of any width: what a store may take.
    pub fn any_parts(&mut self, index: usize, ty: Type) -> Decoded<Vec<Reg>> {
        self.parts(index)?
            .iter()
            .map(|part| self.any_value(index, part, ty))
            .collect()
    }

    /// A value of any width; immediates have the width of `ty`.
    pub fn any_value(&mut self, index: usize, operand: &Operand<'a>, ty: Type) -> Decoded<Reg> {
        if let Operand::Name(name) = operand
            && let Some(Symbol::Register(reg)) = self.decoder.find(name)
        {
            return Ok(reg);
        }
        let slot = self.value(index, operand, ty)?;
        Ok(if ty.bits() == 64 {
            Reg::Wide(slot)
        } else {
            Reg::Word(slot, ty.bits() as u8)
        })
    }

    /// `[base+offset]`. A variable's own space is returned beside it.
    pub fn address(&mut self, index: usize) -> Decoded<(Address, Option<AddressSpace>)> {
        let Operand::Address { base, offset, .. } = self.operand(index)? else {
            return Err(self.operand_error(index, "expected an address in brackets here"));
        };
        let name = match base {
            Base::Absolute => {
                let slot = self.decoder.wide_constant(*offset as u64);
                return Ok((
                    Address {
                        base: Reg::Wide(slot),
                        offset: 0,
                    },
                    None,
                ));
            }
            Base::Name(name) => name,
        };
        match self.decoder.find(name) {
            Some(Symbol::Register(reg @ (Reg::Word(_, 32) | Reg::Wide(_)))) => Ok((
                Address {
                    base: reg,
                    offset: *offset,
                },
                None,
            )),
            Some(Symbol::Variable { space, address, .. }) => {
                let slot = self.decoder.wide_constant(address);
                Ok((
                    Address {
                        base: Reg::Wide(slot),
                        offset: *offset,
                    },
                    Some(space),
                ))
            }
            _ => Err(self.operand_error(index, format!("`{name}` is not an address"))),
        }
    }

    // ---- results ----

    /// Appends an instruction that prepares an operand. It runs in every lane: it has no effect
    /// but on a register of its own.
    fn emit_extra(&mut self, instr: Instr) {
        self.decoder.emit(instr);
    }

    /// Appends the decoded instruction; every modifier must have been taken.
    pub fn emit(&mut self, op: Op, class: Class, flops: u32) -> Decoded<()> {
        self.check_modifiers()?;
        self.decoder.emit(Instr {
            guard: self.guard,
            op,
            class,
            flops,
        });
        Ok(())
    }

    /// Appends a step of an instruction that takes several: arithmetic into a register of its own
    /// or the last but one of its results, under the instruction's guard.
    pub fn step(&mut self, row: RowFn, operands: Operands) {
        let op = Op::Alu(row, operands);
        self.decoder.emit(Instr {
            guard: self.guard,
            op,
            class: Class::Step,
            flops: 0,
        });
    }

    /// Appends arithmetic.
    pub fn alu(&mut self, row: RowFn, operands: Operands, class: Class, flops: u32) -> Decoded<()> {
        self.emit(Op::Alu(row, operands), class, flops)
    }
}
