//! Where the variables of a module lie.

use std::collections::HashMap;

use crate::syntax::LoadError;
use crate::syntax::ast::{Function, Initial, Module, Variable, VariableSpace};

/// Set in the value of a function pointer; the rest is the function's number in the module.
pub(crate) const FUNCTION_TAG: u64 = 1 << 58;

/// Module-wide names: variables in device memory with their addresses, functions by number.
#[derive(Default)]
pub(crate) struct Symbols {
    pub variables: HashMap<String, (u64, u64)>,
    pub functions: HashMap<String, usize>,
}

impl Symbols {
    /// Numbers the functions, and allocates the `.global` and `.const` variables through
    /// `allocate(name, bytes)`.
    pub fn new(
        module: &Module<'_>,
        mut allocate: impl FnMut(&str, u64) -> Result<u64, LoadError>,
    ) -> Result<Symbols, LoadError> {
        let mut symbols = Symbols::default();
        for (number, function) in module.functions.iter().enumerate() {
            // A declaration and the definition share a name: the definition counts.
            if function.body.is_some() || !symbols.functions.contains_key(function.name) {
                symbols.functions.insert(function.name.to_string(), number);
            }
        }
        for variable in device_variables(module) {
            if variable.external {
                let name = variable.name;
                let message = format!("`{name}` is external and no other module can define it");
                return Err(LoadError::whole(message));
            }
            let bytes = variable.bytes();
            let address = allocate(variable.name, bytes)?;
            symbols
                .variables
                .insert(variable.name.to_string(), (address, bytes));
        }
        Ok(symbols)
    }

    /// The bytes that a variable starts with; a variable without initialiser is zero.
    pub fn initial_bytes(&self, variable: &Variable<'_>) -> Result<Vec<u8>, LoadError> {
        let size = variable.element_bytes.min(8) as usize;
        let mut out = Vec::with_capacity(variable.bytes() as usize);
        for value in &variable.initial {
            let bits = match value {
                Initial::Bits(bits) => *bits,
                Initial::Address(name, offset) => self
                    .address(name)
                    .map(|at| at.wrapping_add_signed(*offset))
                    .ok_or_else(|| {
                        LoadError::whole(format!("`{name}` in an initialiser is not declared"))
                    })?,
            };
            out.extend_from_slice(&bits.to_le_bytes()[..size]);
        }
        if out.len() as u64 > variable.bytes() {
            let message = format!("`{}` has more initial values than elements", variable.name);
            return Err(LoadError::whole(message));
        }
        out.resize(variable.bytes() as usize, 0);
        Ok(out)
    }

    fn address(&self, name: &str) -> Option<u64> {
        match self.variables.get(name) {
            Some((address, _)) => Some(*address),
            None => Some(FUNCTION_TAG | *self.functions.get(name)? as u64),
        }
    }
}

/// The variables of a module that live in device memory.
pub(crate) fn device_variables<'m, 'a>(
    module: &'m Module<'a>,
) -> impl Iterator<Item = &'m Variable<'a>> {
    let nested = module
        .functions
        .iter()
        .flat_map(|function| nested_variables(function));
    module
        .variables
        .iter()
        .chain(nested)
        .filter(|v| matches!(v.space, VariableSpace::Global | VariableSpace::Const))
}

/// The variables declared in a function's body, at any depth.
pub(crate) fn nested_variables<'m, 'a>(function: &'m Function<'a>) -> Vec<&'m Variable<'a>> {
    use crate::syntax::ast::Statement;
    let mut out = Vec::new();
    let mut blocks: Vec<&[Statement<'a>]> = function.body.iter().map(Vec::as_slice).collect();
    while let Some(block) = blocks.pop() {
        for statement in block {
            match statement {
                Statement::Variable(variable) => out.push(variable),
                Statement::Block(inner) => blocks.push(inner),
                _ => {}
            }
        }
    }
    out
}

/// Lays variables one behind the other.
#[derive(Default)]
pub(crate) struct Packer {
    pub used: u64,
}

impl Packer {
    /// The offset of the next variable.
    pub fn place(&mut self, bytes: u64, align: u32) -> u64 {
        let at = self.used.next_multiple_of(u64::from(align.max(1)));
        self.used = at + bytes;
        at
    }
}
