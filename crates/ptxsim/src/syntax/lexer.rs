//! PTX text to tokens.

use super::LoadError;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Token<'a> {
    /// Letters, digits, `_`, `$`, `%`, and `::` between them. Numbers are words too: `.2d` and
    /// `0f00000000` are told apart by where they stand.
    Word(&'a str),
    /// The inside of a string literal.
    Text(&'a str),
    /// Any other character.
    Mark(char),
    End,
}

/// A token and where it starts and ends.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spanned<'a> {
    pub token: Token<'a>,
    pub at: usize,
    pub end: usize,
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$' | b'%')
}

/// All tokens of `source`, with an `End` last.
pub(crate) fn tokens(source: &str) -> Result<Vec<Spanned<'_>>, LoadError> {
    let bytes = source.as_bytes();
    // PTX averages one token in four characters.
    let mut out = Vec::with_capacity(bytes.len() / 4);
    let mut at = 0;
    while at < bytes.len() {
        let start = at;
        let token = match bytes[at] {
            byte if byte.is_ascii_whitespace() => {
                at += 1;
                continue;
            }
            // cuobjdump and the driver end PTX with a zero byte.
            0 => break,
            b'/' if bytes.get(at + 1) == Some(&b'/') => {
                at += source[at..].find('\n').unwrap_or(source.len() - at);
                continue;
            }
            b'/' if bytes.get(at + 1) == Some(&b'*') => {
                let Some(length) = source[at..].find("*/") else {
                    return Err(LoadError::at(source, at, "this comment never ends"));
                };
                at += length + 2;
                continue;
            }
            b'"' => {
                let Some(length) = source[at + 1..].find('"') else {
                    return Err(LoadError::at(source, at, "this string never ends"));
                };
                at += length + 2;
                Token::Text(&source[start + 1..at - 1])
            }
            byte if is_word(byte) => {
                while at < bytes.len() {
                    if is_word(bytes[at]) {
                        at += 1;
                    } else if bytes[at..].starts_with(b"::") {
                        at += 2;
                    } else {
                        break;
                    }
                }
                Token::Word(&source[start..at])
            }
            byte if byte.is_ascii() => {
                at += 1;
                Token::Mark(byte as char)
            }
            _ => return Err(LoadError::at(source, at, "PTX is ASCII outside comments")),
        };
        out.push(Spanned {
            token,
            at: start,
            end: at,
        });
    }
    out.push(Spanned {
        token: Token::End,
        at: source.len(),
        end: source.len(),
    });
    Ok(out)
}
