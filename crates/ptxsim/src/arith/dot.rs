//! `dp4a` and `dp2a`: dot products of packed bytes, accumulated in 32 bits.

/// Byte `i` of a word, sign- or zero-extended.
#[inline(always)]
fn byte(word: u32, i: usize, signed: bool) -> i32 {
    let byte = word.to_le_bytes()[i];
    if signed {
        (byte as i8).into()
    } else {
        byte.into()
    }
}

/// `dp4a`: `c + sum(a.byte[i] * b.byte[i])`
#[inline(always)]
pub fn dp4a(a: u32, a_signed: bool, b: u32, b_signed: bool, c: u32) -> u32 {
    (0..4).fold(c, |sum, i| {
        sum.wrapping_add((byte(a, i, a_signed) * byte(b, i, b_signed)) as u32)
    })
}

/// `dp2a`: `c + sum(a.half[i] * b.byte[i])` with the low or the high two bytes of `b`
#[inline(always)]
pub fn dp2a(a: u32, a_signed: bool, b: u32, b_signed: bool, high: bool, c: u32) -> u32 {
    (0..2).fold(c, |sum, i| {
        let half = (a >> (16 * i)) as u16;
        let half = if a_signed {
            (half as i16).into()
        } else {
            i32::from(half)
        };
        sum.wrapping_add((half * byte(b, i + 2 * usize::from(high), b_signed)) as u32)
    })
}
