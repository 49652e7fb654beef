//! Integer arithmetic on the widths of PTX registers: everything wraps unless it says otherwise.

/// An integer register type.
pub trait Int: Copy + Ord {
    /// Its width in bits.
    const BITS: u32;
    /// Whether it is signed.
    const SIGNED: bool;
    /// Its value.
    fn wide(self) -> i128;
    /// The low bits of `value`.
    fn truncated(value: i128) -> Self;
}

macro_rules! int {
    ($($type:ty),*) => {$(
        impl Int for $type {
            const BITS: u32 = <$type>::BITS;
            const SIGNED: bool = <$type>::MIN != 0;
            #[inline(always)]
            fn wide(self) -> i128 {
                self as i128
            }
            #[inline(always)]
            fn truncated(value: i128) -> Self {
                value as $type
            }
        }
    )*};
}

int!(u8, i8, u16, i16, u32, i32, u64, i64);

/// `value` clamped to what `T` holds.
#[inline(always)]
pub fn clamped<T: Int>(value: i128) -> T {
    let (low, high) = if T::SIGNED {
        (-1i128 << (T::BITS - 1), (1i128 << (T::BITS - 1)) - 1)
    } else {
        (0, (1i128 << T::BITS) - 1)
    };
    T::truncated(value.clamp(low, high))
}

/// `add`
#[inline(always)]
pub fn add<T: Int>(a: T, b: T) -> T {
    T::truncated(a.wide() + b.wide())
}

/// `add.sat`
#[inline(always)]
pub fn add_sat<T: Int>(a: T, b: T) -> T {
    clamped(a.wide() + b.wide())
}

/// `sub`
#[inline(always)]
pub fn sub<T: Int>(a: T, b: T) -> T {
    T::truncated(a.wide() - b.wide())
}

/// `sub.sat`
#[inline(always)]
pub fn sub_sat<T: Int>(a: T, b: T) -> T {
    clamped(a.wide() - b.wide())
}

/// `add.cc`, `addc`, `addc.cc`: the sum with carry in, and the carry out.
#[inline(always)]
pub fn add_carry<T: Int>(a: T, b: T, carry: bool) -> (T, bool) {
    let mask = (1i128 << T::BITS) - 1;
    let sum = (a.wide() & mask) + (b.wide() & mask) + i128::from(carry);
    (T::truncated(sum), sum > mask)
}

/// `sub.cc`, `subc`, `subc.cc`: the difference with borrow in, and the borrow out.
#[inline(always)]
pub fn sub_borrow<T: Int>(a: T, b: T, borrow: bool) -> (T, bool) {
    let mask = (1i128 << T::BITS) - 1;
    let difference = (a.wide() & mask) - (b.wide() & mask) - i128::from(borrow);
    (T::truncated(difference), difference < 0)
}

/// `mul.lo`
#[inline(always)]
pub fn mul_lo<T: Int>(a: T, b: T) -> T {
    T::truncated(a.wide().wrapping_mul(b.wide()))
}

/// `mul.hi`: the upper half of the double-width product.
#[inline(always)]
pub fn mul_hi<T: Int>(a: T, b: T) -> T {
    // The product of two u64 needs all 128 bits: shift it as unsigned.
    let product = a.wide().wrapping_mul(b.wide());
    T::truncated((product as u128 >> T::BITS) as i128)
}

/// `mul.wide`: the whole product in the next wider type.
#[inline(always)]
pub fn mul_wide<T: Int, W: Int>(a: T, b: T) -> W {
    W::truncated(a.wide() * b.wide())
}

/// `mad.lo`
#[inline(always)]
pub fn mad_lo<T: Int>(a: T, b: T, c: T) -> T {
    add(mul_lo(a, b), c)
}

/// `mad.hi`
#[inline(always)]
pub fn mad_hi<T: Int>(a: T, b: T, c: T) -> T {
    add(mul_hi(a, b), c)
}

/// `mad.hi.sat.s32`
#[inline(always)]
pub fn mad_hi_sat<T: Int>(a: T, b: T, c: T) -> T {
    add_sat(mul_hi(a, b), c)
}

/// `mad.wide`
#[inline(always)]
pub fn mad_wide<T: Int, W: Int>(a: T, b: T, c: W) -> W {
    add(mul_wide(a, b), c)
}

/// `mul24.lo`, `mul24.hi`: the low or high 32 of the 48 bits of a 24 x 24 bit product.
#[inline(always)]
pub fn mul24<T: Int>(a: T, b: T, high: bool) -> T {
    let low24 = |x: T| {
        let x = x.wide() & 0xff_ffff;
        if T::SIGNED && x & 0x80_0000 != 0 {
            x - 0x100_0000
        } else {
            x
        }
    };
    let product = low24(a) * low24(b);
    T::truncated(if high { product >> 16 } else { product })
}

/// `div`; by zero all bits are one, as the hardware answers, and `MIN / -1` wraps.
#[inline(always)]
pub fn div<T: Int>(a: T, b: T) -> T {
    if b.wide() == 0 {
        T::truncated(-1)
    } else {
        T::truncated(a.wide() / b.wide())
    }
}

/// `rem`: the sign of the dividend; by zero the dividend.
#[inline(always)]
pub fn rem<T: Int>(a: T, b: T) -> T {
    if b.wide() == 0 {
        a
    } else {
        T::truncated(a.wide() % b.wide())
    }
}

/// `neg`
#[inline(always)]
pub fn neg<T: Int>(a: T) -> T {
    T::truncated(-a.wide())
}

/// `abs`; the most negative value stays.
#[inline(always)]
pub fn abs<T: Int>(a: T) -> T {
    T::truncated(a.wide().abs())
}

/// `min.relu`, `max.relu`: negative results become zero.
#[inline(always)]
pub fn relu<T: Int>(a: T) -> T {
    a.max(T::truncated(0))
}

/// `sad`: `c + |a - b|`
#[inline(always)]
pub fn sad<T: Int>(a: T, b: T, c: T) -> T {
    T::truncated((a.wide() - b.wide()).abs() + c.wide())
}

/// `shl`: amounts from the width up give zero.
#[inline(always)]
pub fn shl<T: Int>(a: T, amount: u32) -> T {
    if amount >= T::BITS {
        T::truncated(0)
    } else {
        T::truncated(a.wide() << amount)
    }
}

/// `shr`: arithmetic on signed types; amounts from the width up fill with zeros or the sign.
#[inline(always)]
pub fn shr<T: Int>(a: T, amount: u32) -> T {
    T::truncated(a.wide() >> amount.min(T::BITS))
}
