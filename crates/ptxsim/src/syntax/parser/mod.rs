//! Recursive descent over the tokens.
//!
//! Here are the tokens and what stands at module scope; `declarations` has functions' heads and
//! variables, `bodies` what stands in braces, `operands` what follows an opcode.

mod bodies;
mod declarations;
mod operands;

use crate::syntax::LoadError;
use crate::syntax::ast::*;
use crate::syntax::lexer::{Spanned, Token, tokens};

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

    fn skip_parentheses(&mut self) -> Parsed<()> {
        self.expect('(')?;
        while !self.eat(')') {
            if self.advance() == Token::End {
                return self.error("a `)` is missing");
            }
        }
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
