//! The heads of functions, and variables with their first values.

use super::{Linkage, Parsed, Parser};
use crate::syntax::LoadError;
use crate::syntax::ast::*;
use crate::syntax::lexer::Token;

impl<'a> Parser<'a> {
    pub(super) fn function(&mut self, at: usize, is_entry: bool) -> Parsed<Function<'a>> {
        if self.eat_dotted("attribute") {
            self.skip_parentheses()?;
        }
        let returns = if !is_entry && self.peek() == Token::Mark('(') {
            self.parameters()?
        } else {
            Vec::new()
        };
        let name = self.word("a function name")?;
        let params = if self.peek() == Token::Mark('(') {
            self.parameters()?
        } else {
            Vec::new()
        };
        let mut function = Function {
            at,
            is_entry,
            name,
            returns,
            params,
            max_threads: None,
            max_registers: None,
            min_blocks: None,
            required_block: None,
            required_cluster: None,
            body: None,
        };
        loop {
            match self.peek() {
                Token::Mark(';') => {
                    self.advance();
                    return Ok(function);
                }
                Token::Mark('{') => {
                    function.body = Some(self.block()?);
                    return Ok(function);
                }
                _ => self.tuning(&mut function)?,
            }
        }
    }

    /// A performance-tuning directive between a function's head and its body.
    fn tuning(&mut self, function: &mut Function<'a>) -> Parsed<()> {
        let at = self.at();
        match self.dotted("a directive")? {
            "maxntid" => {
                let [x, y, z] = self.triple()?;
                function.max_threads = Some(x.saturating_mul(y).saturating_mul(z));
            }
            "reqntid" => function.required_block = Some(self.triple()?),
            "reqnctapercluster" => function.required_cluster = Some(self.triple()?),
            "maxnreg" => function.max_registers = Some(self.small()?),
            "minnctapersm" => function.min_blocks = Some(self.small()?),
            "maxnctapersm" | "maxclusterrank" | "abi_preserve" | "abi_preserve_control" => {
                self.small()?;
            }
            "explicitcluster" | "noreturn" => {}
            "pragma" => self.pragma()?,
            other => {
                let message = format!("directive `.{other}` is not modelled here");
                return Err(LoadError::at(self.source, at, message));
            }
        }
        Ok(())
    }

    fn parameters(&mut self) -> Parsed<Vec<Variable<'a>>> {
        self.expect('(')?;
        let mut out = Vec::new();
        if self.eat(')') {
            return Ok(out);
        }
        loop {
            out.push(self.parameter()?);
            if !self.eat(',') {
                break;
            }
        }
        self.expect(')')?;
        Ok(out)
    }

    fn parameter(&mut self) -> Parsed<Variable<'a>> {
        let at = self.at();
        match self.dotted("`.param`")? {
            "param" => {}
            "reg" => {
                return Err(LoadError::at(
                    self.source,
                    at,
                    "`.reg` parameters are not modelled",
                ));
            }
            _ => return Err(LoadError::at(self.source, at, "expected `.param` here")),
        }
        self.declarator(at, VariableSpace::Param, false)
    }

    /// `.global .align 4 .u32 a, b[3] = {1, 2};`
    pub(super) fn variables(&mut self, linkage: Linkage) -> Parsed<Vec<Variable<'a>>> {
        let at = self.at();
        let space = match self.dotted("a state space")? {
            "global" => VariableSpace::Global,
            "const" => VariableSpace::Const,
            "shared" => VariableSpace::Shared,
            "local" => VariableSpace::Local,
            "param" => VariableSpace::Param,
            _ => {
                return Err(LoadError::at(
                    self.source,
                    at,
                    "expected a state space here",
                ));
            }
        };
        let mut first = self.declarator(at, space, linkage.external)?;
        let mut out = Vec::new();
        loop {
            if self.eat('=') {
                first.initial = self.initializer()?;
            }
            let more = self
                .eat(',')
                .then(|| self.declared_name(&first))
                .transpose()?;
            out.push(first);
            match more {
                Some(variable) => first = variable,
                None => break,
            }
        }
        self.expect(';')?;
        Ok(out)
    }

    /// Alignment, type, name and dimensions of a variable.
    fn declarator(
        &mut self,
        at: usize,
        space: VariableSpace,
        external: bool,
    ) -> Parsed<Variable<'a>> {
        let (mut align, mut element_bytes, mut vector) = (None, None, 1);
        while let Some(word) = self.peek_dotted() {
            let word_at = self.at();
            self.next += 2;
            match word {
                "align" => align = Some(self.small()?),
                // `.ptr .global .align 16` says what a parameter points at, not how it is laid out.
                "ptr" => {
                    while let Some(word) = self.peek_dotted() {
                        self.next += 2;
                        if word == "align" {
                            self.small()?;
                        }
                    }
                }
                "attribute" => self.skip_parentheses()?,
                "v2" => vector = 2,
                "v4" => vector = 4,
                ty => match type_bytes(ty) {
                    Some(bytes) => element_bytes = Some(bytes),
                    None => {
                        let message = format!("`.{ty}` is not a type that a variable can have");
                        return Err(LoadError::at(self.source, word_at, message));
                    }
                },
            }
        }
        let Some(element_bytes) = element_bytes else {
            return self.error("expected a type here");
        };
        let element_bytes = element_bytes * vector;
        let align = align.unwrap_or(element_bytes);
        if !align.is_power_of_two() {
            return Err(LoadError::at(
                self.source,
                at,
                "an alignment is a power of two",
            ));
        }
        let pattern = Variable {
            at,
            space,
            align,
            element_bytes,
            name: "",
            elements: None,
            external,
            initial: Vec::new(),
        };
        self.declared_name(&pattern)
    }

    /// A name and its dimensions, with the rest as in `pattern`.
    fn declared_name(&mut self, pattern: &Variable<'a>) -> Parsed<Variable<'a>> {
        let name = self.word("a name")?;
        let mut elements = Some(1u64);
        while self.eat('[') {
            if self.eat(']') {
                elements = None;
                continue;
            }
            let at = self.at();
            let length = u64::try_from(self.integer()?)
                .ok()
                .and_then(|length| elements.unwrap_or(1).checked_mul(length))
                .filter(|&length| length < 1 << 40);
            let Some(length) = length else {
                return Err(LoadError::at(self.source, at, "this array is too large"));
            };
            elements = Some(length);
            self.expect(']')?;
        }
        Ok(Variable {
            name,
            elements,
            initial: Vec::new(),
            ..pattern.clone()
        })
    }

    fn initializer(&mut self) -> Parsed<Vec<Initial<'a>>> {
        let mut out = Vec::new();
        self.initial_values(&mut out)?;
        Ok(out)
    }

    fn initial_values(&mut self, out: &mut Vec<Initial<'a>>) -> Parsed<()> {
        if !self.eat('{') {
            out.push(self.initial_value()?);
            return Ok(());
        }
        self.deeper()?;
        while !self.eat('}') {
            self.initial_values(out)?;
            if !self.eat(',') && self.peek() != Token::Mark('}') {
                return self.error("expected `,` or `}` here");
            }
        }
        self.depth -= 1;
        Ok(())
    }

    fn initial_value(&mut self) -> Parsed<Initial<'a>> {
        if let Token::Word(word) = self.peek()
            && !word.starts_with(|c: char| c.is_ascii_digit())
        {
            self.advance();
            let name = if word == "generic" && self.eat('(') {
                let name = self.word("a variable")?;
                self.expect(')')?;
                name
            } else {
                word
            };
            let offset = if self.eat('+') {
                self.integer()? as i64
            } else {
                0
            };
            return Ok(Initial::Address(name, offset));
        }
        Ok(match self.operand()? {
            Operand::Int(value) => Initial::Bits(value as u64),
            Operand::F32(bits) => Initial::Bits(bits.into()),
            Operand::F64(bits) => Initial::Bits(bits),
            _ => return self.error("expected a number before this"),
        })
    }
}

/// Bytes of a fundamental type that variables and parameters can have.
fn type_bytes(ty: &str) -> Option<u32> {
    Some(match ty {
        "b8" | "u8" | "s8" => 1,
        "b16" | "u16" | "s16" | "f16" | "bf16" => 2,
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" => 4,
        "b64" | "u64" | "s64" | "f64" => 8,
        "b128" => 16,
        _ => return None,
    })
}
