//! Bit manipulation against the ISA's pseudocode, one bit at a time.

use proptest::prelude::*;
use ptxsim::arith::bits::*;
use ptxsim::arith::dot::{dp2a, dp4a};

/// `bfe` as the ISA writes it.
fn bfe_by_bit(a: u64, pos: u32, len: u32, signed: bool, width: u32) -> u64 {
    let msb = width - 1;
    let (pos, len) = (pos & 0xff, len & 0xff);
    let bit = |i: u32| (a >> i) & 1;
    let sbit = if !signed || len == 0 {
        0
    } else {
        bit((pos + len - 1).min(msb))
    };
    (0..=msb).fold(0, |d, i| {
        let value = if i < len && pos + i <= msb {
            bit(pos + i)
        } else {
            sbit
        };
        d | value << i
    })
}

/// `bfi` as the ISA writes it.
fn bfi_by_bit(a: u64, b: u64, pos: u32, len: u32, width: u32) -> u64 {
    let (pos, len) = (pos & 0xff, len & 0xff);
    (0..len).take_while(|i| pos + i < width).fold(b, |f, i| {
        (f & !(1 << (pos + i))) | ((a >> i) & 1) << (pos + i)
    })
}

/// `fns` as the ISA writes it.
fn fns_by_bit(mask: u32, base: u32, offset: i32) -> u32 {
    if offset == 0 {
        return if mask >> base & 1 == 1 {
            base
        } else {
            u32::MAX
        };
    }
    let (mut pos, mut count, inc) = (base as i32, offset.abs() - 1, offset.signum());
    while (0..32).contains(&pos) {
        if mask >> pos & 1 == 1 {
            if count == 0 {
                return pos as u32;
            }
            count -= 1;
        }
        pos += inc;
    }
    u32::MAX
}

proptest! {
    #[test]
    fn fields(a: u64, b: u64, pos in 0u32..80, len in 0u32..80, high in 0u32..2) {
        let (pos, len) = (pos | high << 8, len);
        let (x, y) = (a & 0xffff_ffff, b & 0xffff_ffff);
        for signed in [false, true] {
            prop_assert_eq!(bfe(x, pos, len, signed, 32), bfe_by_bit(x, pos, len, signed, 32));
            prop_assert_eq!(bfe(a, pos, len, signed, 64), bfe_by_bit(a, pos, len, signed, 64));
        }
        prop_assert_eq!(bfi(x, y, pos, len, 32), bfi_by_bit(x, y, pos, len, 32));
        prop_assert_eq!(bfi(a, b, pos, len, 64), bfi_by_bit(a, b, pos, len, 64));
    }

    #[test]
    fn finding(x: u32, wide: u64, mask: u32, base in 0u32..32, offset in -5i32..5) {
        let highest = |x: u64| (0..64).rev().find(|i| x >> i & 1 == 1).unwrap_or(u32::MAX);
        prop_assert_eq!(bfind(x.into(), false, 32, false), highest(x.into()));
        let magnitude = if (x as i32) < 0 { !x } else { x };
        prop_assert_eq!(bfind((x as i32).into(), true, 32, false), highest(magnitude.into()));
        prop_assert_eq!(bfind(wide as i64, false, 64, false), highest(wide));
        if x != 0 {
            prop_assert_eq!(bfind(x.into(), false, 32, true), x.leading_zeros());
        }
        prop_assert_eq!(fns(mask, base, offset), fns_by_bit(mask, base, offset));
    }

    #[test]
    fn logic_tables(a: u32, b: u32, c: u32) {
        for (table, expected) in [
            (0x80, a & b & c), (0xfe, a | b | c), (0x96, a ^ b ^ c), (0xf8, a | (b & c)),
            (0xca, (a & b) | (!a & c)), (0xe8, (a & b) | (b & c) | (a & c)), (0x40, a & b & !c),
            (0x00, 0), (0xff, u32::MAX), (0xf0, a), (0xcc, b), (0xaa, c),
        ] {
            prop_assert_eq!(lop3(a, b, c, table), expected, "{:#x}", table);
        }
    }

    #[test]
    fn funnels(low: u32, high: u32, amount in 0u32..80) {
        let pair = u64::from(high) << 32 | u64::from(low);
        let (wrapped, clamped) = (amount % 32, amount.min(32));
        prop_assert_eq!(shf_l(low, high, amount, true), (pair << wrapped >> 32) as u32);
        prop_assert_eq!(shf_l(low, high, amount, false), if clamped == 32 { low } else { (pair << clamped >> 32) as u32 });
        prop_assert_eq!(shf_r(low, high, amount, true), (pair >> wrapped) as u32);
        prop_assert_eq!(shf_r(low, high, amount, false), if clamped == 32 { high } else { (pair >> clamped) as u32 });
    }

    #[test]
    fn dots(a: [i8; 4], b: [i8; 4], h: [i16; 2], c: i32) {
        let word = |x: [i8; 4]| u32::from_le_bytes(x.map(|x| x as u8));
        let signed: i32 = (0..4).map(|i| i32::from(a[i]) * i32::from(b[i])).sum();
        prop_assert_eq!(dp4a(word(a), true, word(b), true, c as u32) as i32, c.wrapping_add(signed));
        let mixed: i32 = (0..4).map(|i| i32::from(a[i] as u8) * i32::from(b[i])).sum();
        prop_assert_eq!(dp4a(word(a), false, word(b), true, c as u32) as i32, c.wrapping_add(mixed));
        let halves = u32::from(h[0] as u16) | u32::from(h[1] as u16) << 16;
        for (high, first) in [(false, 0), (true, 2)] {
            let sum: i32 = (0..2).map(|i| i32::from(h[i]) * i32::from(b[first + i])).sum();
            prop_assert_eq!(dp2a(halves, true, word(b), true, high, c as u32) as i32, c.wrapping_add(sum));
        }
    }

    #[test]
    fn extensions(x: u32, length in 0u32..40) {
        let keep = |n: u32| if n >= 32 { x } else { x & ((1u32 << n) - 1) };
        prop_assert_eq!(szext(x, length, false, false), keep(length));
        prop_assert_eq!(szext(x, length, false, true), keep(length % 32));
        let signed = (1..32).contains(&length) && x >> (length - 1) & 1 == 1;
        let expected = if signed { keep(length) | u32::MAX << length } else { keep(length) };
        prop_assert_eq!(szext(x, length, true, false), expected);
        let ones = |from: u32, n: u32| (from..from.saturating_add(n)).filter(|i| *i < 32).fold(0, |m, i| m | 1u32 << i);
        prop_assert_eq!(bmsk(length, x % 40, false), ones(length, x % 40));
        prop_assert_eq!(bmsk(length, x, true), ones(length % 32, x % 32));
    }
}

/// The ISA's table of `prmt` modes, bytes from the highest to the lowest.
#[test]
fn prmt_follows_the_table() {
    let (a, b) = (0x3322_1100, 0x7766_5544);
    let word = |bytes: [u32; 4]| bytes.iter().fold(0, |w, byte| (w << 8) | (byte * 0x11));
    let table: [(Permute, [[u32; 4]; 4]); 6] = [
        (
            Permute::Forward4,
            [[3, 2, 1, 0], [4, 3, 2, 1], [5, 4, 3, 2], [6, 5, 4, 3]],
        ),
        (
            Permute::Backward4,
            [[5, 6, 7, 0], [6, 7, 0, 1], [7, 0, 1, 2], [0, 1, 2, 3]],
        ),
        (
            Permute::Replicate8,
            [[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]],
        ),
        (
            Permute::EdgeClampLeft,
            [[3, 2, 1, 0], [3, 2, 1, 1], [3, 2, 2, 2], [3, 3, 3, 3]],
        ),
        (
            Permute::EdgeClampRight,
            [[0, 0, 0, 0], [1, 1, 1, 0], [2, 2, 1, 0], [3, 2, 1, 0]],
        ),
        (
            Permute::Replicate16,
            [[1, 0, 1, 0], [3, 2, 3, 2], [1, 0, 1, 0], [3, 2, 3, 2]],
        ),
    ];
    for (mode, rows) in table {
        for (selector, bytes) in rows.into_iter().enumerate() {
            assert_eq!(
                prmt(a, b, selector as u32, mode),
                word(bytes),
                "{mode:?} {selector}"
            );
        }
    }
    assert_eq!(prmt(a, b, 0x5410, Permute::Generic), 0x5544_1100);
    assert_eq!(prmt(0x0000_8001, 0, 0x98_98, Permute::Generic), 0xff00_ff00);
}
