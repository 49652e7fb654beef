//! A warp's registers, and the loops that apply a scalar function to its lanes.

use std::sync::Arc;

use half::{bf16, f16};

use crate::program::{Operands, Reg};

/// One value per lane.
pub(crate) type Row<T> = [T; 32];

/// All lanes.
pub(crate) const FULL: u32 = u32::MAX;

/// A register's number in its file, or from [`Slot::CONSTANTS`] on a constant's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Slot(pub u32);

impl Slot {
    /// The first number of a constant.
    pub const CONSTANTS: u32 = 1 << 30;
}

/// The immediates of a program, each as a row of equal values, so that they read like registers.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Constants {
    pub words: Vec<Row<u32>>,
    pub wides: Vec<Row<u64>>,
    pub predicates: Vec<u32>,
}

/// How many registers of each kind a program uses.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RegisterCounts {
    pub words: u32,
    pub wides: u32,
    pub predicates: u32,
}

/// The registers of one warp: up to 32 bits in `words` (narrow ones in the low bits), 64 bits in
/// `wides`, predicates as one bit per lane.
pub(crate) struct Registers {
    words: Vec<Row<u32>>,
    wides: Vec<Row<u64>>,
    predicates: Vec<u32>,
    constants: Arc<Constants>,
}

impl Registers {
    pub fn new(counts: RegisterCounts, constants: Arc<Constants>) -> Registers {
        Registers {
            // What nobody has set is a NaN, not a zero that happens to be right.
            words: vec![[u32::MAX; 32]; counts.words as usize],
            wides: vec![[u64::MAX; 32]; counts.wides as usize],
            predicates: vec![0; counts.predicates as usize],
            constants,
        }
    }

    #[inline]
    pub fn word(&self, slot: Slot) -> &Row<u32> {
        match slot.0.checked_sub(Slot::CONSTANTS) {
            None => &self.words[slot.0 as usize],
            Some(constant) => &self.constants.words[constant as usize],
        }
    }

    #[inline]
    pub fn wide(&self, slot: Slot) -> &Row<u64> {
        match slot.0.checked_sub(Slot::CONSTANTS) {
            None => &self.wides[slot.0 as usize],
            Some(constant) => &self.constants.wides[constant as usize],
        }
    }

    #[inline]
    pub fn predicate(&self, slot: Slot) -> u32 {
        match slot.0.checked_sub(Slot::CONSTANTS) {
            None => self.predicates[slot.0 as usize],
            Some(constant) => self.constants.predicates[constant as usize],
        }
    }

    #[inline]
    pub fn word_mut(&mut self, slot: Slot) -> &mut Row<u32> {
        &mut self.words[slot.0 as usize]
    }

    #[inline]
    pub fn wide_mut(&mut self, slot: Slot) -> &mut Row<u64> {
        &mut self.wides[slot.0 as usize]
    }

    /// Replaces the lanes of `mask`.
    #[inline]
    pub fn set_word(&mut self, slot: Slot, mask: u32, values: &Row<u32>) {
        merge(self.word_mut(slot), mask, values);
    }

    /// Replaces the lanes of `mask`.
    #[inline]
    pub fn set_wide(&mut self, slot: Slot, mask: u32, values: &Row<u64>) {
        merge(self.wide_mut(slot), mask, values);
    }

    /// Replaces the lanes of `mask`.
    #[inline]
    pub fn set_predicate(&mut self, slot: Slot, mask: u32, bits: u32) {
        let predicate = &mut self.predicates[slot.0 as usize];
        *predicate = *predicate & !mask | bits & mask;
    }

    /// Writes the low bits of `value` to one lane of a register.
    #[inline]
    pub fn put(&mut self, reg: Reg, lane: usize, value: u64) {
        match reg {
            Reg::Word(slot, 32) => self.word_mut(slot)[lane] = value as u32,
            Reg::Word(slot, bits) => {
                self.word_mut(slot)[lane] = value as u32 & ((1 << bits) - 1);
            }
            Reg::Wide(slot) => self.wide_mut(slot)[lane] = value,
            Reg::Predicate(_) | Reg::Sink => {}
        }
    }

    /// One lane of a register.
    #[inline]
    pub fn get(&self, reg: Reg, lane: usize) -> u64 {
        match reg {
            Reg::Word(slot, _) => self.word(slot)[lane].into(),
            Reg::Wide(slot) => self.wide(slot)[lane],
            Reg::Predicate(_) | Reg::Sink => 0,
        }
    }
}

#[inline]
fn merge<T: Copy>(target: &mut Row<T>, mask: u32, values: &Row<T>) {
    if mask == FULL {
        *target = *values;
    } else {
        for lane in lanes(mask) {
            target[lane] = values[lane];
        }
    }
}

/// The lanes of a mask, upwards.
#[inline]
pub(crate) fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        let lane = rest.trailing_zeros() as usize;
        let some = rest != 0;
        rest &= rest.wrapping_sub(1);
        some.then_some(lane)
    })
}

/// The lowest lane of a mask that is not empty.
#[inline]
pub(crate) fn first_lane(mask: u32) -> usize {
    mask.trailing_zeros() as usize & 31
}

/// A type that an instruction can read from and write to registers.
pub(crate) trait Lane: Copy + Default {
    fn fetch(registers: &Registers, slot: Slot) -> Row<Self>;
    fn commit(registers: &mut Registers, slot: Slot, mask: u32, values: &Row<Self>);
}

macro_rules! lane {
    ($($ty:ty, $read:ident, $write:ident, $from:expr, $to:expr;)*) => {$(
        impl Lane for $ty {
            #[inline(always)]
            fn fetch(registers: &Registers, slot: Slot) -> Row<$ty> {
                registers.$read(slot).map($from)
            }
            #[inline(always)]
            fn commit(registers: &mut Registers, slot: Slot, mask: u32, values: &Row<$ty>) {
                registers.$write(slot, mask, &values.map($to));
            }
        }
    )*};
}

lane! {
    u32, word, set_word, |bits| bits, |value| value;
    i32, word, set_word, |bits| bits as i32, |value| value as u32;
    f32, word, set_word, f32::from_bits, f32::to_bits;
    u16, word, set_word, |bits| bits as u16, u32::from;
    i16, word, set_word, |bits| bits as i16, |value| u32::from(value as u16);
    f16, word, set_word, |bits| f16::from_bits(bits as u16), |value| value.to_bits().into();
    bf16, word, set_word, |bits| bf16::from_bits(bits as u16), |value| value.to_bits().into();
    u8, word, set_word, |bits| bits as u8, u32::from;
    i8, word, set_word, |bits| bits as i8, |value| u32::from(value as u8);
    u64, wide, set_wide, |bits| bits, |value| value;
    i64, wide, set_wide, |bits| bits as i64, |value| value as u64;
    f64, wide, set_wide, f64::from_bits, f64::to_bits;
}

/// Two 16-bit values in one register, the lower half first.
macro_rules! packed_lane {
    ($($half:ty, $from:expr, $to:expr;)*) => {$(
        impl Lane for [$half; 2] {
            #[inline(always)]
            fn fetch(registers: &Registers, slot: Slot) -> Row<[$half; 2]> {
                registers.word(slot).map(|bits| [$from(bits as u16), $from((bits >> 16) as u16)])
            }
            #[inline(always)]
            fn commit(registers: &mut Registers, slot: Slot, mask: u32, values: &Row<[$half; 2]>) {
                let bits = values.map(|[low, high]| {
                    u32::from($to(low)) | u32::from($to(high)) << 16
                });
                registers.set_word(slot, mask, &bits);
            }
        }
    )*};
}

packed_lane! {
    f16, f16::from_bits, f16::to_bits;
    bf16, bf16::from_bits, bf16::to_bits;
    u16, |bits: u16| bits, |value: u16| value;
    i16, |bits: u16| bits as i16, |value: i16| value as u16;
}

impl Lane for bool {
    #[inline(always)]
    fn fetch(registers: &Registers, slot: Slot) -> Row<bool> {
        let bits = registers.predicate(slot);
        std::array::from_fn(|lane| bits >> lane & 1 == 1)
    }
    #[inline(always)]
    fn commit(registers: &mut Registers, slot: Slot, mask: u32, values: &Row<bool>) {
        let bits = values
            .iter()
            .rev()
            .fold(0, |bits, &value| bits << 1 | u32::from(value));
        registers.set_predicate(slot, mask, bits);
    }
}

/// Applies one instruction's arithmetic to the lanes of a mask.
pub(crate) type RowFn = fn(&mut Registers, &Operands, u32);

/// `f` for the lanes of `mask`; what lies in the others is dropped by `commit`.
#[inline(always)]
fn each<D: Lane>(mask: u32, f: impl Fn(usize) -> D) -> Row<D> {
    if mask == FULL {
        std::array::from_fn(f)
    } else {
        let mut out = [D::default(); 32];
        for lane in lanes(mask) {
            out[lane] = f(lane);
        }
        out
    }
}

#[inline(always)]
pub(crate) fn map1<D: Lane, A: Lane>(
    registers: &mut Registers,
    operands: &Operands,
    mask: u32,
    f: impl Fn(A, &Operands) -> D,
) {
    let a = A::fetch(registers, operands.a);
    let d = each(mask, |lane| f(a[lane], operands));
    D::commit(registers, operands.d, mask, &d);
}

#[inline(always)]
pub(crate) fn map2<D: Lane, A: Lane, B: Lane>(
    registers: &mut Registers,
    operands: &Operands,
    mask: u32,
    f: impl Fn(A, B, &Operands) -> D,
) {
    let (a, b) = (
        A::fetch(registers, operands.a),
        B::fetch(registers, operands.b),
    );
    let d = each(mask, |lane| f(a[lane], b[lane], operands));
    D::commit(registers, operands.d, mask, &d);
}

#[inline(always)]
pub(crate) fn map3<D: Lane, A: Lane, B: Lane, C: Lane>(
    registers: &mut Registers,
    operands: &Operands,
    mask: u32,
    f: impl Fn(A, B, C, &Operands) -> D,
) {
    let (a, b) = (
        A::fetch(registers, operands.a),
        B::fetch(registers, operands.b),
    );
    let c = C::fetch(registers, operands.c);
    let d = each(mask, |lane| f(a[lane], b[lane], c[lane], operands));
    D::commit(registers, operands.d, mask, &d);
}

#[inline(always)]
pub(crate) fn map4<D: Lane, A: Lane, B: Lane, C: Lane, E: Lane>(
    registers: &mut Registers,
    operands: &Operands,
    mask: u32,
    f: impl Fn(A, B, C, E, &Operands) -> D,
) {
    let (a, b) = (
        A::fetch(registers, operands.a),
        B::fetch(registers, operands.b),
    );
    let (c, e) = (
        C::fetch(registers, operands.c),
        E::fetch(registers, operands.e),
    );
    let d = each(mask, |lane| f(a[lane], b[lane], c[lane], e[lane], operands));
    D::commit(registers, operands.d, mask, &d);
}

/// As [`map3`], with a predicate beside the result: carries and `p|q` comparisons.
#[inline(always)]
pub(crate) fn map3_with_predicate<D: Lane, A: Lane, B: Lane, C: Lane>(
    registers: &mut Registers,
    operands: &Operands,
    mask: u32,
    f: impl Fn(A, B, C, &Operands) -> (D, bool),
) {
    let (a, b) = (
        A::fetch(registers, operands.a),
        B::fetch(registers, operands.b),
    );
    let c = C::fetch(registers, operands.c);
    let mut q = [false; 32];
    let mut d = [D::default(); 32];
    for lane in lanes(mask) {
        (d[lane], q[lane]) = f(a[lane], b[lane], c[lane], operands);
    }
    D::commit(registers, operands.d, mask, &d);
    bool::commit(registers, operands.q, mask, &q);
}
