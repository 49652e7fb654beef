//! What stands in a function's braces.

use super::{Linkage, Parsed, Parser};
use crate::syntax::LoadError;
use crate::syntax::ast::*;
use crate::syntax::lexer::Token;

impl<'a> Parser<'a> {
    pub(super) fn block(&mut self) -> Parsed<Vec<Statement<'a>>> {
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
}
