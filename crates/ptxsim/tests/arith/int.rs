//! Integer arithmetic against the host's wider types.

use proptest::prelude::*;
use ptxsim::arith::int::*;

proptest! {
    #[test]
    fn products(a: u64, b: u64, c: u64) {
        let (x, y, z) = (a as u32, b as u32, c as u32);
        prop_assert_eq!(mul_lo(a, b), a.wrapping_mul(b));
        prop_assert_eq!(mul_hi(a, b), ((u128::from(a) * u128::from(b)) >> 64) as u64);
        let (sa, sb) = (a as i64, b as i64);
        prop_assert_eq!(mul_hi(sa, sb), ((i128::from(sa) * i128::from(sb)) >> 64) as i64);
        prop_assert_eq!(mul_hi(x, y), ((u64::from(x) * u64::from(y)) >> 32) as u32);
        let (sx, sy, sz) = (x as i32, y as i32, z as i32);
        let high = ((i64::from(sx) * i64::from(sy)) >> 32) as i32;
        prop_assert_eq!(mul_hi(sx, sy), high);
        prop_assert_eq!(mad_hi(sx, sy, sz), high.wrapping_add(sz));
        prop_assert_eq!(mad_hi_sat(sx, sy, sz), high.saturating_add(sz));
        prop_assert_eq!(mul_hi(x as u16, y as u16), ((u32::from(x as u16) * u32::from(y as u16)) >> 16) as u16);
        prop_assert_eq!(mul_wide::<u32, u64>(x, y), u64::from(x) * u64::from(y));
        prop_assert_eq!(mul_wide::<i32, i64>(sx, sy), i64::from(sx) * i64::from(sy));
        prop_assert_eq!(mad_wide::<i32, i64>(sx, sy, c as i64), (i64::from(sx) * i64::from(sy)).wrapping_add(c as i64));
        prop_assert_eq!(mad_lo(x, y, z), x.wrapping_mul(y).wrapping_add(z));
        let (s24, t24) = (sx << 8 >> 8, sy << 8 >> 8);
        let wide = i64::from(s24) * i64::from(t24);
        prop_assert_eq!((mul24(sx, sy, false), mul24(sx, sy, true)), (wide as i32, (wide >> 16) as i32));
        let wide = u64::from(x & 0xff_ffff) * u64::from(y & 0xff_ffff);
        prop_assert_eq!((mul24(x, y, false), mul24(x, y, true)), (wide as u32, (wide >> 16) as u32));
    }

    /// A 128-bit sum and difference in four 32-bit steps.
    #[test]
    fn carries_chain(a: u128, b: u128) {
        let word = |x: u128, i: usize| (x >> (32 * i)) as u32;
        let (mut sum, mut difference, mut carry, mut borrow) = (0u128, 0u128, false, false);
        for i in 0..4 {
            let (s, c) = add_carry(word(a, i), word(b, i), carry);
            let (d, w) = sub_borrow(word(a, i) as i32, word(b, i) as i32, borrow);
            sum |= u128::from(s) << (32 * i);
            difference |= u128::from(d as u32) << (32 * i);
            (carry, borrow) = (c, w);
        }
        prop_assert_eq!((sum, carry), a.overflowing_add(b));
        prop_assert_eq!((difference, borrow), a.overflowing_sub(b));
    }

    #[test]
    fn sums_and_quotients(a: i32, b: i32, c: i32) {
        prop_assert_eq!(add(a, b), a.wrapping_add(b));
        prop_assert_eq!(sub(a, b), a.wrapping_sub(b));
        prop_assert_eq!(add_sat(a, b), a.saturating_add(b));
        prop_assert_eq!(sub_sat(a, b), a.saturating_sub(b));
        prop_assert_eq!(sad(a, b, c), a.abs_diff(b).wrapping_add(c as u32) as i32);
        prop_assert_eq!(sad(a as u32, b as u32, c as u32), (a as u32).abs_diff(b as u32).wrapping_add(c as u32));
        prop_assert_eq!((neg(a), abs(a), relu(a)), (a.wrapping_neg(), a.wrapping_abs(), a.max(0)));
        prop_assume!(b != 0);
        prop_assert_eq!((div(a, b), rem(a, b)), (a.wrapping_div(b), a.wrapping_rem(b)));
        prop_assert_eq!((div(a as u32, b as u32), rem(a as u32, b as u32)), (a as u32 / b as u32, a as u32 % b as u32));
    }

    #[test]
    fn shifts_clamp(x: u64, amount in 0u32..100) {
        let bit = |value: u64, i: u32| value.checked_shr(i).unwrap_or(0);
        prop_assert_eq!(shl(x, amount), x.checked_shl(amount).unwrap_or(0));
        prop_assert_eq!(shr(x, amount), bit(x, amount));
        prop_assert_eq!(shl(x as u16, amount), if amount < 16 { (x as u16) << amount } else { 0 });
        prop_assert_eq!(shr(x as i32, amount), x as i32 >> amount.min(31));
        prop_assert_eq!(shr(x as i64, amount), x as i64 >> amount.min(63));
    }
}

#[test]
fn division_by_zero_and_overflow_do_not_trap() {
    assert_eq!((div(7u32, 0), rem(7u32, 0)), (u32::MAX, 7));
    assert_eq!((div(i32::MIN, -1), rem(i32::MIN, -1)), (i32::MIN, 0));
    assert_eq!((div(i64::MIN, -1), abs(i64::MIN)), (i64::MIN, i64::MIN));
}
