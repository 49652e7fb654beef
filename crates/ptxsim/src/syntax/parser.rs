//! Recursive descent over the tokens.

use super::LoadError;
use super::ast::*;
use super::lexer::{Spanned, Token, tokens};

type Parsed<T> = Result<T, LoadError>;

/// How deep braces may nest; nvcc stays below ten.
const MAX_DEPTH: u32 = 64;

/// Reads a PTX text.
pub(crate) fn parse(source: &str) -> Parsed<Module<'_>> {
    let mut parser = Parser {
        source,
        tokens: tokens(source)?,
        next: 0,
        depth: 0,
    };
    parser.module()
}

struct Parser<'a> {
    source: &'a str,
    tokens: Vec<Spanned<'a>>,
    next: usize,
    depth: u32,
}

/// What linking directives said about the declaration that follows.
#[derive(Default)]
struct Linkage {
    external: bool,
}

impl<'a> Parser<'a> {
    // ---- tokens ----

    fn peek(&self) -> Token<'a> {
        self.tokens[self.next].token
    }

    fn peek_at(&self, ahead: usize) -> Token<'a> {
        self.tokens
            .get(self.next + ahead)
            .map_or(Token::End, |spanned| spanned.token)
    }

    fn at(&self) -> usize {
        self.tokens[self.next].at
    }

    fn advance(&mut self) -> Token<'a> {
        let token = self.peek();
        if self.next + 1 < self.tokens.len() {
            self.next += 1;
        }
        token
    }

    fn error<T>(&self, message: impl Into<String>) -> Parsed<T> {
        Err(LoadError::at(self.source, self.at(), message))
    }

    fn eat(&mut self, mark: char) -> bool {
        let found = self.peek() == Token::Mark(mark);
        if found {
            self.advance();
        }
        found
    }

    fn expect(&mut self, mark: char) -> Parsed<()> {
        match self.eat(mark) {
            true => Ok(()),
            false => self.error(format!("expected `{mark}` here")),
        }
    }

    fn word(&mut self, what: &str) -> Parsed<&'a str> {
        match self.peek() {
            Token::Word(word) => {
                self.advance();
                Ok(word)
            }
            _ => self.error(format!("expected {what} here")),
        }
    }

    /// A directive or modifier: a dot and a word.
    fn dotted(&mut self, what: &str) -> Parsed<&'a str> {
        self.expect('.')?;
        self.word(what)
    }

    /// The word after a dot, when that comes next.
    fn peek_dotted(&self) -> Option<&'a str> {
        match (self.peek(), self.peek_at(1)) {
            (Token::Mark('.'), Token::Word(word)) => Some(word),
            _ => None,
        }
    }

    fn eat_dotted(&mut self, word: &str) -> bool {
        let found = self.peek_dotted() == Some(word);
        if found {
            self.advance();
            self.advance();
        }
        found
    }

    fn integer(&mut self) -> Parsed<i128> {
        let at = self.at();
        let negative = self.eat('-');
        let word = self.word("a number")?;
        match parse_integer(word) {
            Some(value) => Ok(if negative { -value } else { value }),
            None => Err(LoadError::at(
                self.source,
                at,
                format!("`{word}` is not a whole number"),
            )),
        }
    }

    fn small(&mut self) -> Parsed<u32> {
        let at = self.at();
        u32::try_from(self.integer()?)
            .map_err(|_| LoadError::at(self.source, at, "this number does not fit 32 bits"))
    }

    fn triple(&mut self) -> Parsed<[u32; 3]> {
        let mut out = [self.small()?, 1, 1];
        for value in &mut out[1..] {
            if !self.eat(',') {
                break;
            }
            *value = self.small()?;
        }
        Ok(out)
    }

    /// Skips a balanced `{...}`.
    fn skip_braces(&mut self) -> Parsed<()> {
        self.expect('{')?;
        let mut depth = 1;
        while depth > 0 {
            match self.advance() {
                Token::Mark('{') => depth += 1,
                Token::Mark('}') => depth -= 1,
                Token::End => return self.error("a `}` is missing"),
                _ => {}
            }
        }
        Ok(())
    }

    // ---- module scope ----

    fn module(&mut self) -> Parsed<Module<'a>> {
        let mut module = Module::default();
        let mut linkage = Linkage::default();
        while self.peek() != Token::End {
            let at = self.at();
            match self.dotted("a directive")? {
                "version" => {
                    self.word("a version")?;
                    self.expect('.')?;
                    self.word("a version")?;
                }
                "target" => {
                    module.target = self.word("a target")?;
                    while self.eat(',') {
                        self.word("a target option")?;
                    }
                }
                "address_size" => {
                    if self.integer()? != 64 {
                        return Err(LoadError::at(
                            self.source,
                            at,
                            "only 64-bit PTX is modelled",
                        ));
                    }
                }
                "file" => {
                    let number = self.small()?;
                    let Token::Text(name) = self.advance() else {
                        return self.error("expected a file name before this");
                    };
                    while self.eat(',') {
                        self.integer()?;
                    }
                    module.files.push((number, name));
                }
                "section" => {
                    self.dotted("a section name")?;
                    self.skip_braces()?;
                }
                "visible" | "weak" | "common" => {}
                "extern" => linkage.external = true,
                "pragma" => self.pragma()?,
                "global" | "const" | "shared" | "local" => {
                    self.next -= 2;
                    module
                        .variables
                        .extend(self.variables(std::mem::take(&mut linkage))?);
                }
                "entry" => {
                    module.functions.push(self.function(at, true)?);
                    linkage = Linkage::default();
                }
                "func" => {
                    module.functions.push(self.function(at, false)?);
                    linkage = Linkage::default();
                }
                other => {
                    let message = format!("directive `.{other}` is not modelled here");
                    return Err(LoadError::at(self.source, at, message));
                }
            }
        }
        if module.target.is_empty() {
            return Err(LoadError::whole("this is not PTX: it has no `.target`"));
        }
        Ok(module)
    }

    fn pragma(&mut self) -> Parsed<()> {
        while self.peek() != Token::Mark(';') {
            if self.advance() == Token::End {
                return self.error("a `;` is missing");
            }
        }
        self.expect(';')
    }

    fn function(&mut self, at: usize, is_entry: bool) -> Parsed<Function<'a>> {
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

    fn skip_parentheses(&mut self) -> Parsed<()> {
        self.expect('(')?;
        while !self.eat(')') {
            if self.advance() == Token::End {
                return self.error("a `)` is missing");
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
    fn variables(&mut self, linkage: Linkage) -> Parsed<Vec<Variable<'a>>> {
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

    fn deeper(&mut self) -> Parsed<()> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            self.error("braces nest too deep here")
        } else {
            Ok(())
        }
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

    // ---- bodies ----

    fn block(&mut self) -> Parsed<Vec<Statement<'a>>> {
        self.expect('{')?;
        self.deeper()?;
        let mut out = Vec::new();
        while !self.eat('}') {
            self.statement(&mut out)?;
        }
        self.depth -= 1;
        Ok(out)
    }

    fn statement(&mut self, out: &mut Vec<Statement<'a>>) -> Parsed<()> {
        match (self.peek(), self.peek_at(1)) {
            (Token::Mark('{'), _) => out.push(Statement::Block(self.block()?)),
            (Token::Mark(';'), _) => {
                self.advance();
            }
            (Token::Mark('.'), _) => self.directive(out)?,
            (Token::Word(name), Token::Mark(':')) => {
                self.advance();
                self.advance();
                self.labelled(name, out)?;
            }
            (Token::Word(_) | Token::Mark('@'), _) => {
                out.push(Statement::Instruction(self.instruction()?));
            }
            (Token::End, _) => return self.error("a `}` is missing"),
            _ => return self.error("expected an instruction here"),
        }
        Ok(())
    }

    fn labelled(&mut self, name: &'a str, out: &mut Vec<Statement<'a>>) -> Parsed<()> {
        match self.peek_dotted() {
            Some("branchtargets") => {
                self.next += 2;
                let mut targets = Vec::new();
                loop {
                    let at = self.at();
                    targets.push((at, self.word("a label")?));
                    if !self.eat(',') {
                        break;
                    }
                }
                self.expect(';')?;
                out.push(Statement::BranchTargets { name, targets });
            }
            Some("callprototype" | "calltargets") => {
                self.pragma()?;
                out.push(Statement::CallPrototype { name });
            }
            _ => out.push(Statement::Label(name)),
        }
        Ok(())
    }

    fn directive(&mut self, out: &mut Vec<Statement<'a>>) -> Parsed<()> {
        let at = self.at();
        match self.peek_dotted() {
            Some("reg") => out.push(Statement::Registers(self.registers()?)),
            Some("shared" | "local" | "param" | "const" | "global") => {
                let variables = self.variables(Linkage::default())?;
                out.extend(variables.into_iter().map(Statement::Variable));
            }
            Some("loc") => {
                self.next += 2;
                let (file, line) = (self.small()?, self.small()?);
                self.small()?;
                if self.eat(',') {
                    self.word("`function_name`")?;
                    self.word("a label")?;
                    if self.eat('+') {
                        self.integer()?;
                    }
                    self.expect(',')?;
                    self.word("`inlined_at`")?;
                    for _ in 0..3 {
                        self.small()?;
                    }
                }
                out.push(Statement::Loc { file, line });
            }
            Some("pragma") => {
                self.next += 2;
                self.pragma()?;
            }
            Some(other) => {
                let message = format!("directive `.{other}` is not modelled here");
                return Err(LoadError::at(self.source, at, message));
            }
            None => return self.error("expected a directive here"),
        }
        Ok(())
    }

    fn registers(&mut self) -> Parsed<Registers<'a>> {
        let at = self.at();
        self.next += 2;
        let ty = self.dotted("a register type")?;
        let mut names = Vec::new();
        loop {
            let name = self.word("a register name")?;
            let count = if self.eat('<') {
                let count = self.small()?;
                if count > 1 << 20 {
                    return self.error("that is too many registers");
                }
                self.expect('>')?;
                Some(count)
            } else {
                None
            };
            names.push((name, count));
            if !self.eat(',') {
                break;
            }
        }
        self.expect(';')?;
        Ok(Registers { at, ty, names })
    }

    fn instruction(&mut self) -> Parsed<Instruction<'a>> {
        let at = self.at();
        let guard = if self.eat('@') {
            let negated = self.eat('!');
            Some((self.word("a predicate")?, negated))
        } else {
            None
        };
        let opcode = self.word("an opcode")?;
        let mut modifiers = Vec::new();
        while let Some(word) = self.peek_dotted() {
            self.next += 2;
            modifiers.push(word);
        }
        let mut operands = Vec::new();
        while self.peek() != Token::Mark(';') {
            let operand_at = self.at();
            let operand = self.operand()?;
            operands.push((operand_at, operand));
            if !self.eat(',') {
                break;
            }
        }
        let end = self.tokens[self.next].end;
        self.expect(';')?;
        Ok(Instruction {
            at,
            end,
            guard,
            opcode,
            modifiers,
            operands,
        })
    }

    fn operand(&mut self) -> Parsed<Operand<'a>> {
        match self.peek() {
            Token::Mark('{') => {
                self.advance();
                self.deeper()?;
                let mut parts = Vec::new();
                loop {
                    parts.push(self.operand()?);
                    if !self.eat(',') {
                        break;
                    }
                }
                self.depth -= 1;
                self.expect('}')?;
                Ok(Operand::Vector(parts))
            }
            Token::Mark('[') => self.address(),
            Token::Mark('(') => {
                self.advance();
                let mut names = Vec::new();
                while !self.eat(')') {
                    names.push(self.word("a parameter")?);
                    if !self.eat(',') && self.peek() != Token::Mark(')') {
                        return self.error("expected `,` or `)` here");
                    }
                }
                Ok(Operand::List(names))
            }
            Token::Mark('!') => {
                self.advance();
                Ok(Operand::Not(self.word("a predicate")?))
            }
            Token::Mark('-') => {
                self.advance();
                self.deeper()?;
                let operand = self.operand()?;
                self.depth -= 1;
                Ok(match operand {
                    Operand::Int(value) => Operand::Int(-value),
                    Operand::F64(bits) => Operand::F64(bits ^ 1 << 63),
                    other => Operand::Negated(Box::new(other)),
                })
            }
            Token::Word(word) if word.starts_with(|c: char| c.is_ascii_digit()) => {
                self.number(word)
            }
            Token::Word(_) => self.named(),
            _ => self.error("expected an operand here"),
        }
    }

    fn number(&mut self, word: &'a str) -> Parsed<Operand<'a>> {
        let at = self.at();
        self.advance();
        let bad = || LoadError::at(self.source, at, format!("`{word}` is not a number"));
        if let Some(hex) = word.strip_prefix("0f").or_else(|| word.strip_prefix("0F")) {
            return match u32::from_str_radix(hex, 16) {
                Ok(bits) if hex.len() == 8 => Ok(Operand::F32(bits)),
                _ => Err(bad()),
            };
        }
        if let Some(hex) = word.strip_prefix("0d").or_else(|| word.strip_prefix("0D")) {
            return match u64::from_str_radix(hex, 16) {
                Ok(bits) if hex.len() == 16 => Ok(Operand::F64(bits)),
                _ => Err(bad()),
            };
        }
        if let (Token::Mark('.'), Token::Word(fraction)) = (self.peek(), self.peek_at(1)) {
            self.next += 2;
            let value: f64 = format!("{word}.{fraction}").parse().map_err(|_| bad())?;
            return Ok(Operand::F64(value.to_bits()));
        }
        parse_integer(word).map(Operand::Int).ok_or_else(bad)
    }

    /// `name`, `%tid.x`, `a|b`, `name+8`, `name[8]`.
    fn named(&mut self) -> Parsed<Operand<'a>> {
        let start = self.at();
        let mut name = self.word("a name")?;
        if self.peek_dotted().is_some() {
            self.next += 2;
            name = &self.source[start..self.tokens[self.next - 1].end];
        }
        match self.peek() {
            Token::Mark('|') => {
                self.advance();
                Ok(Operand::Pair(name, self.word("a predicate")?))
            }
            Token::Mark(sign @ ('+' | '-')) => {
                self.advance();
                let offset = self.integer()? as i64;
                Ok(Operand::Sum(
                    name,
                    if sign == '-' {
                        offset.wrapping_neg()
                    } else {
                        offset
                    },
                ))
            }
            _ => Ok(Operand::Name(name)),
        }
    }

    fn address(&mut self) -> Parsed<Operand<'a>> {
        self.expect('[')?;
        let (base, offset) = match self.peek() {
            Token::Word(word) if word.starts_with(|c: char| c.is_ascii_digit()) => {
                (Base::Absolute, self.integer()? as i64)
            }
            _ => {
                let name = self.word("an address")?;
                let offset = match self.peek() {
                    Token::Mark('+') => {
                        self.advance();
                        self.integer()? as i64
                    }
                    Token::Mark('-') => self.integer()? as i64,
                    _ => 0,
                };
                (Base::Name(name), offset)
            }
        };
        let coordinates = if self.eat(',') {
            match self.operand()? {
                Operand::Vector(parts) => parts,
                _ => return self.error("expected coordinates in braces before this"),
            }
        } else {
            Vec::new()
        };
        self.expect(']')?;
        Ok(Operand::Address {
            base,
            offset,
            coordinates,
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

/// `12`, `0x1F`, `017`, `0b11`, each with an optional `U`.
fn parse_integer(word: &str) -> Option<i128> {
    let word = word.strip_suffix(['U', 'u']).unwrap_or(word);
    let (digits, radix) = match word.as_bytes() {
        [b'0', b'x' | b'X', ..] => (&word[2..], 16),
        [b'0', b'b' | b'B', ..] => (&word[2..], 2),
        [b'0', _, ..] => (&word[1..], 8),
        _ => (word, 10),
    };
    u64::from_str_radix(digits, radix).ok().map(i128::from)
}
