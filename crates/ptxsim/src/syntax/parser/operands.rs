//! Operands, numbers and addresses.

use super::{Parsed, Parser, parse_integer};
use crate::syntax::LoadError;
use crate::syntax::ast::*;
use crate::syntax::lexer::Token;

impl<'a> Parser<'a> {
    pub(super) fn operand(&mut self) -> Parsed<Operand<'a>> {
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
