//! A kernel and its functions, from tree to [`Program`].

use std::collections::HashMap;
use std::sync::Arc;

use super::layout::{Packer, Symbols};
use super::line::Line;
use super::pressure::Mentions;
use super::reach::{Reach, names_of, targets_of};
use super::types::Type;
use super::*;
use crate::syntax::LoadError;
use crate::syntax::ast::{self, Function, Module, Statement, Variable, VariableSpace};

/// What a name in a function stands for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Symbol {
    Register(Reg),
    /// A variable's address in its space, and its size.
    Variable {
        space: AddressSpace,
        address: u64,
        bytes: u64,
    },
    /// A function, by its number in the module.
    Function(usize),
    Label(usize),
    /// A list of branch targets.
    Targets(usize),
    /// `.callprototype`: says nothing that the arguments do not.
    Prototype,
}

/// The names that one pair of braces declares.
#[derive(Default)]
struct Scope<'a> {
    names: HashMap<&'a str, Symbol>,
    /// `%r<10>`: prefix, count, and the first register.
    families: HashMap<&'a str, (u32, Reg)>,
}

/// Decodes the kernel numbered `entry` of `module`.
pub(crate) fn decode(
    module: &Module<'_>,
    entry: usize,
    symbols: &Symbols,
    text: &Arc<ModuleText>,
) -> Result<Program, LoadError> {
    let mut decoder = Decoder {
        module,
        symbols,
        source: &text.source,
        scopes: vec![Scope::default()],
        code: Vec::new(),
        origins: Vec::new(),
        named: Vec::new(),
        current: Origin {
            at: 0,
            end: 0,
            source: None,
        },
        registers: RegisterCounts::default(),
        constants: Constants::default(),
        words: HashMap::new(),
        wides: HashMap::new(),
        labels: Vec::new(),
        targets: Vec::new(),
        shared: HashMap::new(),
        local: Packer::default(),
        functions: vec![None; module.functions.len()],
        carry: None,
        mentions: Mentions::default(),
        in_entry: true,
    };
    decoder.predicate_constants();
    let reach = Reach::of(module, entry);
    let shared_bytes = decoder.lay_out_shared(&reach)?;
    let function = &module.functions[entry];
    let mut packer = Packer::default();
    let mut params = Vec::new();
    for variable in &function.params {
        let bytes = variable.bytes();
        let offset = packer.place(bytes, variable.align);
        params.push(Param {
            offset: offset as u32,
            size: bytes as u32,
            align: variable.align,
        });
        decoder.declare(variable, AddressSpace::Param, offset);
    }
    for number in &reach.functions[1..] {
        decoder.declare_function(*number);
    }
    decoder.body(function)?;
    decoder.in_entry = false;
    for number in &reach.functions[1..] {
        decoder.function(*number)?;
    }
    decoder.link()?;
    if decoder.local.used >= 1 << 24 || packer.used > 1 << 16 {
        return Err(decoder.error(function.at, "its variables do not fit local or param space"));
    }
    let counts = decoder.registers;
    let live_registers = match reach.functions.len() {
        1 => std::mem::take(&mut decoder.mentions).most_live(&decoder.code),
        // What is live around a call is live in it too.
        _ => counts.words + 2 * counts.wides,
    };
    Ok(Program {
        live_registers,
        name: function.name.into(),
        code: decoder.code,
        origins: decoder.origins,
        named: decoder.named,
        registers: decoder.registers,
        constants: Arc::new(decoder.constants),
        params: params.into(),
        params_bytes: packer.used as u32,
        shared_bytes,
        local_bytes: decoder.local.used as u32,
        functions: decoder.functions,
        max_threads: function.max_threads,
        max_registers: function.max_registers,
        min_blocks: function.min_blocks,
        required_block: function.required_block,
        required_cluster: function.required_cluster,
        text: text.clone(),
    })
}

pub(super) struct Decoder<'m, 'a> {
    module: &'m Module<'a>,
    symbols: &'m Symbols,
    source: &'m str,
    scopes: Vec<Scope<'a>>,
    code: Vec<Instr>,
    origins: Vec<Origin>,
    named: Vec<Vec<(Slot, bool)>>,
    current: Origin,
    registers: RegisterCounts,
    constants: Constants,
    words: HashMap<u32, Slot>,
    wides: HashMap<u64, Slot>,
    /// The instruction of each label; `None` until it is reached.
    labels: Vec<Option<u32>>,
    targets: Vec<Vec<usize>>,
    /// Addresses of shared variables, by where they are declared.
    shared: HashMap<usize, u64>,
    local: Packer,
    functions: Vec<Option<CallTarget>>,
    carry: Option<Slot>,
    mentions: Mentions,
    pub in_entry: bool,
}

/// The predicate that is always false, and the one that is always true.
pub(super) const FALSE: Slot = Slot(Slot::CONSTANTS);
pub(super) const TRUE: Slot = Slot(Slot::CONSTANTS + 1);

impl<'m, 'a> Decoder<'m, 'a> {
    pub fn error(&self, at: usize, message: impl Into<String>) -> LoadError {
        LoadError::at(self.source, at, message)
    }

    fn predicate_constants(&mut self) {
        self.constants.predicates = vec![0, u32::MAX];
    }

    /// Places every shared variable that the kernel uses; returns the bytes that have a size.
    /// Variables without one all start behind the others.
    fn lay_out_shared(&mut self, reach: &Reach<'a>) -> Result<u32, LoadError> {
        let mut packer = Packer::default();
        let mut dynamic = Vec::new();
        let own = reach
            .functions
            .iter()
            .flat_map(|&number| layout::nested_variables(&self.module.functions[number]));
        let outer = self
            .module
            .variables
            .iter()
            .filter(|v| reach.names.contains(v.name));
        for variable in outer
            .chain(own)
            .filter(|v| v.space == VariableSpace::Shared)
        {
            if variable.elements.is_none() {
                dynamic.push(variable);
            } else {
                let address = packer.place(variable.bytes(), variable.align);
                self.shared.insert(variable.at, address);
            }
        }
        let align = dynamic.iter().map(|v| v.align).max().unwrap_or(1);
        let base = packer.place(0, align);
        for variable in dynamic {
            self.shared.insert(variable.at, base);
        }
        if base > 1 << 24 {
            return Err(LoadError::whole(
                "the shared variables of a kernel are too large",
            ));
        }
        for variable in &self.module.variables {
            if let Some(&address) = self.shared.get(&variable.at) {
                self.declare(variable, AddressSpace::Shared, address);
            }
        }
        Ok(base as u32)
    }

    fn declare(&mut self, variable: &Variable<'a>, space: AddressSpace, address: u64) {
        let symbol = Symbol::Variable {
            space,
            address,
            bytes: variable.bytes(),
        };
        self.bind(variable.name, symbol);
    }

    fn bind(&mut self, name: &'a str, symbol: Symbol) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.names.insert(name, symbol);
        }
    }

    /// Gives a function's parameters and results their places in local memory.
    fn declare_function(&mut self, number: usize) {
        let function = &self.module.functions[number];
        let mut place = |variables: &[Variable<'a>]| {
            let place = |v: &Variable<'a>| {
                (
                    self.local.place(v.bytes(), v.align) as u32,
                    v.bytes() as u32,
                )
            };
            variables.iter().map(place).collect()
        };
        let (params, returns) = (place(&function.params), place(&function.returns));
        self.functions[number] = Some(CallTarget {
            pc: 0,
            params,
            returns,
        });
    }

    fn function(&mut self, number: usize) -> Result<(), LoadError> {
        let function = &self.module.functions[number];
        let pc = self.code.len() as u32;
        self.scopes.push(Scope::default());
        if let Some(mut target) = self.functions[number].take() {
            target.pc = pc;
            let places = target.params.iter().chain(&target.returns);
            for (variable, &(at, _)) in function.params.iter().chain(&function.returns).zip(places)
            {
                self.declare(variable, AddressSpace::Local, at.into());
            }
            self.functions[number] = Some(target);
        }
        self.body(function)?;
        self.scopes.pop();
        Ok(())
    }

    fn body(&mut self, function: &'m Function<'a>) -> Result<(), LoadError> {
        let Some(statements) = &function.body else {
            return Err(self.error(function.at, format!("`{}` has no body", function.name)));
        };
        self.block(statements)?;
        // Falling off the end returns.
        let op = if self.in_entry { Op::Exit } else { Op::Return };
        self.current = Origin {
            at: function.at as u32,
            end: function.at as u32,
            source: None,
        };
        self.emit(Instr {
            guard: None,
            op,
            class: Class::Control,
            flops: 0,
        });
        Ok(())
    }

    fn block(&mut self, statements: &'m [Statement<'a>]) -> Result<(), LoadError> {
        self.scopes.push(Scope::default());
        // Labels may be used before they stand, names of registers and variables may not.
        for statement in statements {
            match statement {
                Statement::Label(name) => {
                    self.labels.push(None);
                    self.bind(name, Symbol::Label(self.labels.len() - 1));
                }
                Statement::BranchTargets { name, .. } => {
                    self.targets.push(Vec::new());
                    self.bind(name, Symbol::Targets(self.targets.len() - 1));
                }
                Statement::CallPrototype { name } => self.bind(name, Symbol::Prototype),
                _ => {}
            }
        }
        for statement in statements {
            self.statement(statement)?;
        }
        self.scopes.pop();
        Ok(())
    }

    fn statement(&mut self, statement: &'m Statement<'a>) -> Result<(), LoadError> {
        match statement {
            Statement::Label(name) => {
                if let Some(Symbol::Label(label)) = self.find(name) {
                    self.labels[label] = Some(self.code.len() as u32);
                }
            }
            Statement::BranchTargets { name, targets } => {
                let mut labels = Vec::new();
                for (at, target) in targets {
                    match self.find(target) {
                        Some(Symbol::Label(label)) => labels.push(label),
                        _ => return Err(self.error(*at, format!("there is no label `{target}`"))),
                    }
                }
                if let Some(Symbol::Targets(number)) = self.find(name) {
                    self.targets[number] = labels;
                }
            }
            Statement::Registers(registers) => self.declare_registers(registers)?,
            Statement::Variable(variable) => self.declare_variable(variable),
            Statement::Block(inner) => self.block(inner)?,
            Statement::Loc { file, line } => self.current.source = Some((*file, *line)),
            Statement::CallPrototype { .. } => {}
            Statement::Instruction(instruction) => {
                self.current.at = instruction.at as u32;
                self.current.end = instruction.end as u32;
                let pc = self.code.len() as u32;
                let targets = targets_of(instruction);
                let mut words = Vec::new();
                for name in names_of(instruction) {
                    if let Some(Symbol::Register(reg)) = self.find(name) {
                        self.mentions.note(reg, pc);
                        if let Reg::Word(slot, _) = reg {
                            words.push((slot, targets.contains(&name)));
                        }
                    }
                }
                opcodes::decode(Line::new(self, instruction)?)?;
                // An instruction that takes several steps does its work in the last.
                self.named.resize(self.code.len(), Vec::new());
                if let Some(named) = self.named.last_mut() {
                    *named = words;
                }
            }
        }
        Ok(())
    }

    fn declare_variable(&mut self, variable: &Variable<'a>) {
        match variable.space {
            VariableSpace::Local | VariableSpace::Param => {
                let at = self.local.place(variable.bytes(), variable.align);
                self.declare(variable, AddressSpace::Local, at);
            }
            VariableSpace::Shared => {
                let at = self.shared.get(&variable.at).copied().unwrap_or_default();
                self.declare(variable, AddressSpace::Shared, at);
            }
            // Device variables are known by name all over the module.
            VariableSpace::Global | VariableSpace::Const => {}
        }
    }

    fn declare_registers(&mut self, registers: &ast::Registers<'a>) -> Result<(), LoadError> {
        let class = match Type::parse(registers.ty) {
            Some(Type::B128) | None => {
                let message = format!("registers of type `.{}` are not modelled", registers.ty);
                return Err(self.error(registers.at, message));
            }
            Some(ty) => ty,
        };
        for &(name, count) in &registers.names {
            let first = self.new_registers(class, count.unwrap_or(1));
            match (count, self.scopes.last_mut()) {
                (Some(count), Some(scope)) => {
                    scope.families.insert(name, (count, first));
                }
                _ => self.bind(name, Symbol::Register(first)),
            }
        }
        Ok(())
    }

    /// `count` new registers in a row; the first is returned.
    pub fn new_registers(&mut self, ty: Type, count: u32) -> Reg {
        let next = |counter: &mut u32| {
            let slot = Slot(*counter);
            *counter += count;
            slot
        };
        match ty.bits() {
            1 => Reg::Predicate(next(&mut self.registers.predicates)),
            64 => Reg::Wide(next(&mut self.registers.wides)),
            bits => Reg::Word(next(&mut self.registers.words), bits as u8),
        }
    }

    pub fn new_word(&mut self) -> Slot {
        self.registers.words += 1;
        Slot(self.registers.words - 1)
    }

    pub fn new_wide(&mut self) -> Slot {
        self.registers.wides += 1;
        Slot(self.registers.wides - 1)
    }

    pub fn new_predicate(&mut self) -> Slot {
        self.registers.predicates += 1;
        Slot(self.registers.predicates - 1)
    }

    /// The condition code that `.cc` instructions share.
    pub fn carry(&mut self) -> Slot {
        match self.carry {
            Some(carry) => carry,
            None => {
                let carry = self.new_predicate();
                self.carry = Some(carry);
                carry
            }
        }
    }

    /// What `name` stands for here.
    pub fn find(&self, name: &str) -> Option<Symbol> {
        let prefix = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let index = name[prefix.len()..].parse::<u32>().ok();
        for scope in self.scopes.iter().rev() {
            if let Some(symbol) = scope.names.get(name) {
                return Some(*symbol);
            }
            if let (Some(index), Some((count, first))) = (index, scope.families.get(prefix))
                && index < *count
            {
                return Some(Symbol::Register(match *first {
                    Reg::Word(slot, bits) => Reg::Word(Slot(slot.0 + index), bits),
                    Reg::Wide(slot) => Reg::Wide(Slot(slot.0 + index)),
                    Reg::Predicate(slot) => Reg::Predicate(Slot(slot.0 + index)),
                    Reg::Sink => Reg::Sink,
                }));
            }
        }
        if let Some(&(address, bytes)) = self.symbols.variables.get(name) {
            return Some(Symbol::Variable {
                space: AddressSpace::Global,
                address,
                bytes,
            });
        }
        self.symbols
            .functions
            .get(name)
            .map(|&number| Symbol::Function(number))
    }

    /// The labels of a list of branch targets.
    pub fn target_labels(&self, number: usize) -> &[usize] {
        &self.targets[number]
    }

    pub fn word_constant(&mut self, bits: u32) -> Slot {
        let words = &mut self.constants.words;
        *self.words.entry(bits).or_insert_with(|| {
            words.push([bits; 32]);
            Slot(Slot::CONSTANTS + words.len() as u32 - 1)
        })
    }

    pub fn wide_constant(&mut self, bits: u64) -> Slot {
        let wides = &mut self.constants.wides;
        *self.wides.entry(bits).or_insert_with(|| {
            wides.push([bits; 32]);
            Slot(Slot::CONSTANTS + wides.len() as u32 - 1)
        })
    }

    pub fn emit(&mut self, instr: Instr) {
        self.code.push(instr);
        self.origins.push(self.current);
    }

    /// Turns label numbers into instruction numbers.
    fn link(&mut self) -> Result<(), LoadError> {
        for (pc, instr) in self.code.iter_mut().enumerate() {
            let targets = match &mut instr.op {
                Op::Branch { target } => std::slice::from_mut(target),
                Op::BranchIndexed { targets, .. } => targets,
                _ => continue,
            };
            for target in targets {
                // A label always stands in the block that declared it.
                *target = self.labels[*target as usize].unwrap_or(pc as u32);
            }
        }
        Ok(())
    }

    pub fn module_function(&self, number: usize) -> &'m Function<'a> {
        &self.module.functions[number]
    }
}
