//! Which functions and variables a kernel uses.

use std::collections::HashSet;

use crate::syntax::ast::{Base, Instruction, Module, Operand, Statement};

/// What a kernel can reach through names.
pub(crate) struct Reach<'a> {
    /// Numbers of the functions to decode, the kernel first.
    pub functions: Vec<usize>,
    /// Every name that their instructions mention.
    pub names: HashSet<&'a str>,
}

impl<'a> Reach<'a> {
    /// Follows names from the function numbered `entry`.
    pub fn of(module: &Module<'a>, entry: usize) -> Reach<'a> {
        let mut reach = Reach {
            functions: vec![entry],
            names: HashSet::new(),
        };
        let mut next = 0;
        let mut calls_pointers = false;
        while let Some(&number) = reach.functions.get(next) {
            next += 1;
            let mut names = HashSet::new();
            let mut blocks = vec![module.functions[number].body.as_deref().unwrap_or_default()];
            while let Some(block) = blocks.pop() {
                for statement in block {
                    match statement {
                        Statement::Block(inner) => blocks.push(inner),
                        Statement::Instruction(instruction) => {
                            calls_pointers |= is_pointer_call(instruction);
                            names.extend(names_of(instruction));
                        }
                        _ => {}
                    }
                }
            }
            for (number, function) in module.functions.iter().enumerate() {
                let reached = names.contains(function.name) || calls_pointers;
                let callable = !function.is_entry && function.body.is_some();
                if reached && callable && !reach.functions.contains(&number) {
                    reach.functions.push(number);
                }
            }
            reach.names.extend(names);
        }
        reach
    }
}

/// A call whose target is a register: the third operand names its prototype.
fn is_pointer_call(instruction: &Instruction<'_>) -> bool {
    let target = instruction
        .operands
        .iter()
        .find_map(|(_, operand)| match operand {
            Operand::Name(name) => Some(*name),
            _ => None,
        });
    instruction.opcode == "call" && target.is_some_and(|name| name.starts_with('%'))
}

/// Every name that an instruction mentions.
pub(super) fn names_of<'a>(instruction: &Instruction<'a>) -> Vec<&'a str> {
    let mut names: Vec<&str> = instruction.guard.iter().map(|(name, _)| *name).collect();
    for (_, operand) in &instruction.operands {
        mention(operand, &mut names);
    }
    names
}

/// The names of what an instruction writes: its first operand, if that is not an address.
pub(super) fn targets_of<'a>(instruction: &Instruction<'a>) -> Vec<&'a str> {
    let mut names = Vec::new();
    if let Some((_, first)) = instruction.operands.first()
        && !matches!(first, Operand::Address { .. })
    {
        mention(first, &mut names);
    }
    names
}

fn mention<'a>(operand: &Operand<'a>, names: &mut Vec<&'a str>) {
    match operand {
        Operand::Name(name) | Operand::Sum(name, _) | Operand::Not(name) => names.push(name),
        Operand::Pair(first, second) => names.extend([*first, *second]),
        Operand::List(parameters) => names.extend(parameters),
        Operand::Negated(inner) => mention(inner, names),
        Operand::Address {
            base, coordinates, ..
        } => {
            if let Base::Name(name) = base {
                names.push(name);
            }
            coordinates.iter().for_each(|part| mention(part, names));
        }
        Operand::Vector(parts) => parts.iter().for_each(|part| mention(part, names)),
        Operand::Int(_) | Operand::F32(_) | Operand::F64(_) => {}
    }
}
