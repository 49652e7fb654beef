//! `set`, `setp` and `testp`.

use super::float::Float;

/// A comparison of `set` and `setp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Comparison {
    /// `.eq`
    Eq,
    /// `.ne`
    Ne,
    /// `.lt`, `.lo`
    Lt,
    /// `.le`, `.ls`
    Le,
    /// `.gt`, `.hi`
    Gt,
    /// `.ge`, `.hs`
    Ge,
    /// `.equ`: equal or unordered
    Equ,
    /// `.neu`: unequal or unordered
    Neu,
    /// `.ltu`: less or unordered
    Ltu,
    /// `.leu`: less, equal or unordered
    Leu,
    /// `.gtu`: greater or unordered
    Gtu,
    /// `.geu`: greater, equal or unordered
    Geu,
    /// `.num`: neither is NaN
    Num,
    /// `.nan`: either is NaN
    Nan,
}

/// `a op b` on integers (or on any ordered operands; unordered ones count as NaN).
#[inline(always)]
pub fn compare<T: PartialOrd>(a: T, b: T, comparison: Comparison) -> bool {
    use std::cmp::Ordering::{Equal, Greater, Less};
    let order = a.partial_cmp(&b);
    match comparison {
        Comparison::Eq => order == Some(Equal),
        Comparison::Ne => matches!(order, Some(Less | Greater)),
        Comparison::Lt => order == Some(Less),
        Comparison::Le => matches!(order, Some(Less | Equal)),
        Comparison::Gt => order == Some(Greater),
        Comparison::Ge => matches!(order, Some(Greater | Equal)),
        Comparison::Equ => matches!(order, Some(Equal) | None),
        Comparison::Neu => order != Some(Equal),
        Comparison::Ltu => matches!(order, Some(Less) | None),
        Comparison::Leu => order != Some(Greater),
        Comparison::Gtu => matches!(order, Some(Greater) | None),
        Comparison::Geu => order != Some(Less),
        Comparison::Num => order.is_some(),
        Comparison::Nan => order.is_none(),
    }
}

/// [`compare`] on floats, with `.ftz`.
#[inline(always)]
pub fn compare_float<F: Float + PartialOrd>(a: F, b: F, comparison: Comparison, ftz: bool) -> bool {
    if ftz {
        compare(a.flushed(), b.flushed(), comparison)
    } else {
        compare(a, b, comparison)
    }
}

/// A property that `testp` asks about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Property {
    /// `.finite`
    Finite,
    /// `.infinite`
    Infinite,
    /// `.number`
    Number,
    /// `.notanumber`
    NotANumber,
    /// `.normal`: neither zero, subnormal, infinite nor NaN
    Normal,
    /// `.subnormal`
    Subnormal,
}

/// `testp`
pub fn test<F: Float>(x: F, property: Property) -> bool {
    let magnitude = x.magnitude();
    let infinity = F::FORMAT.infinity();
    let lowest_normal = 1 << F::FORMAT.fraction_bits;
    match property {
        Property::Finite => magnitude < infinity,
        Property::Infinite => magnitude == infinity,
        Property::Number => !x.is_nan(),
        Property::NotANumber => x.is_nan(),
        Property::Normal => (lowest_normal..infinity).contains(&magnitude),
        Property::Subnormal => (1..lowest_normal).contains(&magnitude),
    }
}
