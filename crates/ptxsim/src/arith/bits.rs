//! Bit manipulation: counts, fields, permutes, funnel shifts and three-input logic.

/// `popc.b32`, `popc.b64` and the other counts come from Rust (`count_ones`, `leading_zeros`,
/// `reverse_bits`); here is what Rust lacks.
///
/// `bfind`: the position of the highest bit that differs from the sign, or `u32::MAX`.
/// `value` is sign- or zero-extended to 64 bits by the caller.
#[inline(always)]
pub fn bfind(value: i64, signed: bool, width: u32, shift_amount: bool) -> u32 {
    let magnitude = if signed && value < 0 { !value } else { value } as u64;
    let magnitude = if width == 32 {
        magnitude & 0xffff_ffff
    } else {
        magnitude
    };
    match magnitude {
        0 => u32::MAX,
        _ if shift_amount => width - 1 - (63 - magnitude.leading_zeros()),
        _ => 63 - magnitude.leading_zeros(),
    }
}

/// `bfe`: `length` bits of `value` from `position`, both taken modulo 256; a signed field is
/// extended by its top bit, which is the value's own sign where the field reaches beyond it.
#[inline(always)]
pub fn bfe(value: u64, position: u32, length: u32, signed: bool, width: u32) -> u64 {
    let (position, length) = (position & 0xff, length & 0xff);
    if length == 0 {
        return 0;
    }
    let top = (position + length - 1).min(width - 1);
    let fill = signed && (value >> top) & 1 == 1;
    let available = if position >= width {
        0
    } else {
        (value & low(width)) >> position
    };
    let taken = (top + 1).saturating_sub(position);
    let field = available & low(taken);
    if fill {
        (field | !low(taken)) & low(width)
    } else {
        field
    }
}

/// `bfi`: the low `length` bits of `field` written into `base` at `position`.
#[inline(always)]
pub fn bfi(field: u64, base: u64, position: u32, length: u32, width: u32) -> u64 {
    let (position, length) = (position & 0xff, length & 0xff);
    if position >= width {
        return base;
    }
    let mask = (low(length.min(width)) << position) & low(width);
    (base & !mask) | ((field << position) & mask)
}

/// The lowest `count` bits set.
#[inline(always)]
fn low(count: u32) -> u64 {
    if count >= 64 {
        u64::MAX
    } else {
        (1 << count) - 1
    }
}

/// `bmsk`: `length` ones from `position`; `.clamp` or `.wrap` (modulo 32).
#[inline(always)]
pub fn bmsk(position: u32, length: u32, wrap: bool) -> u32 {
    let (position, length) = if wrap {
        (position & 31, length & 31)
    } else {
        (position, length)
    };
    if position >= 32 {
        0
    } else {
        (low(length.min(32)) << position) as u32
    }
}

/// `szext`: `value` extended from its low `length` bits; `.clamp` or `.wrap` (modulo 32).
#[inline(always)]
pub fn szext(value: u32, length: u32, signed: bool, wrap: bool) -> u32 {
    let length = if wrap { length & 31 } else { length };
    match length {
        0 => 0,
        32.. => value,
        _ if signed => ((value << (32 - length)) as i32 >> (32 - length)) as u32,
        _ => value & low(length) as u32,
    }
}

/// `fns`: the position of the `offset`-th set bit counted from `base`, upwards for positive and
/// downwards for negative offsets (0 asks whether `base` itself is set); `u32::MAX` if none.
pub fn fns(mask: u32, base: u32, offset: i32) -> u32 {
    if base > 31 {
        return u32::MAX;
    }
    let is_set = |bit: &u32| mask >> bit & 1 == 1;
    let nth = offset.unsigned_abs().saturating_sub(1) as usize;
    let found = match offset {
        0 => Some(base).filter(is_set),
        1.. => (base..32).filter(is_set).nth(nth),
        _ => (0..=base).rev().filter(is_set).nth(nth),
    };
    found.unwrap_or(u32::MAX)
}

/// `shf.l`: the upper 32 bits of `high:low << amount`, clamped to 32 or wrapped modulo 32.
#[inline(always)]
pub fn shf_l(low: u32, high: u32, amount: u32, wrap: bool) -> u32 {
    let amount = if wrap { amount & 31 } else { amount.min(32) };
    let pair = u64::from(high) << 32 | u64::from(low);
    ((pair << amount) >> 32) as u32
}

/// `shf.r`: the lower 32 bits of `high:low >> amount`, clamped to 32 or wrapped modulo 32.
#[inline(always)]
pub fn shf_r(low: u32, high: u32, amount: u32, wrap: bool) -> u32 {
    let amount = if wrap { amount & 31 } else { amount.min(32) };
    let pair = u64::from(high) << 32 | u64::from(low);
    (pair >> amount) as u32
}

/// `lop3`: bit `i` of `table` is the result where `a`, `b`, `c` read `i` in binary.
#[inline(always)]
pub fn lop3(a: u32, b: u32, c: u32, table: u8) -> u32 {
    let mut result = 0;
    for entry in 0..8 {
        if table >> entry & 1 == 1 {
            let pick = |x: u32, bit: u32| if entry & bit != 0 { x } else { !x };
            result |= pick(a, 4) & pick(b, 2) & pick(c, 1);
        }
    }
    result
}

/// How `prmt` builds its selectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Permute {
    /// Four selectors of four bits in `c`; bit 3 of each replicates the byte's sign.
    Generic,
    /// `.f4e`: four bytes upwards from `c`.
    Forward4,
    /// `.b4e`: four bytes downwards from `c`, wrapping.
    Backward4,
    /// `.rc8`: one byte four times.
    Replicate8,
    /// `.ecl`: edge clamp left.
    EdgeClampLeft,
    /// `.ecr`: edge clamp right.
    EdgeClampRight,
    /// `.rc16`: one half twice.
    Replicate16,
}

/// `prmt`: four bytes chosen from the eight of `b:a`.
#[inline(always)]
pub fn prmt(a: u32, b: u32, c: u32, mode: Permute) -> u32 {
    let bytes = (u64::from(b) << 32 | u64::from(a)).to_le_bytes();
    let base = (c & 3) as usize;
    u32::from_le_bytes(std::array::from_fn(|i| match mode {
        Permute::Generic => {
            let selector = c >> (4 * i);
            let byte = bytes[(selector & 7) as usize];
            if selector & 8 == 0 {
                byte
            } else {
                (byte as i8 >> 7) as u8
            }
        }
        Permute::Forward4 => bytes[base + i],
        Permute::Backward4 => bytes[(base + 8 - i) % 8],
        Permute::Replicate8 => bytes[base],
        Permute::EdgeClampLeft => bytes[base.max(i)],
        Permute::EdgeClampRight => bytes[base.min(i)],
        Permute::Replicate16 => bytes[(base & 1) * 2 + (i & 1)],
    }))
}
