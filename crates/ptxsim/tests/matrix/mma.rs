//! `mma.sync`: every layout as the ISA writes it, every product against a wider type.

use half::{bf16, f16};
use proptest::prelude::*;
use ptxsim::arith::{Format, convert};
use ptxsim::matrix::mma::{Accumulator, Input, Mma, multiply_f64, multiply_float, multiply_int};

type Position = fn(usize, usize, usize) -> (usize, usize);

/// Input types, shape, and the positions of A's and B's elements.
type Layout = (&'static [Input], (usize, usize, usize), Position, Position);

/// The ISA's formulas, `(group, thread, i) -> (row, column)`, for A and for B.
const LAYOUTS: &[Layout] = &[
    (&[Input::F64], (8, 8, 4), |g, t, _| (g, t), |g, t, _| (t, g)),
    (
        &[Input::S8, Input::U8],
        (8, 8, 16),
        |g, t, i| (g, t * 4 + i),
        |g, t, i| (t * 4 + i, g),
    ),
    (
        &[Input::S4, Input::U4],
        (8, 8, 32),
        |g, t, i| (g, t * 8 + i),
        |g, t, i| (t * 8 + i, g),
    ),
    (
        &[Input::Tf32],
        (16, 8, 4),
        |g, t, i| (if i == 0 { g } else { g + 8 }, t),
        |g, t, _| (t, g),
    ),
    (
        &[Input::F64],
        (16, 8, 4),
        |g, t, i| (if i == 0 { g } else { g + 8 }, t),
        |g, t, _| (t, g),
    ),
    (
        &[Input::F16, Input::Bf16],
        (16, 8, 8),
        |g, t, i| (if i < 2 { g } else { g + 8 }, t * 2 + (i & 1)),
        |g, t, i| (t * 2 + i, g),
    ),
    (
        &[Input::Tf32, Input::F64],
        (16, 8, 8),
        |g, t, i| {
            (
                if i == 0 || i == 2 { g } else { g + 8 },
                if i < 2 { t } else { t + 4 },
            )
        },
        |g, t, i| (if i == 0 { t } else { t + 4 }, g),
    ),
    (
        &[Input::F16, Input::Bf16],
        (16, 8, 16),
        |g, t, i| {
            let row = if i < 2 || (4..6).contains(&i) {
                g
            } else {
                g + 8
            };
            (
                row,
                if i < 4 {
                    t * 2 + (i & 1)
                } else {
                    t * 2 + (i & 1) + 8
                },
            )
        },
        |g, t, i| {
            (
                if i < 2 {
                    t * 2 + (i & 1)
                } else {
                    t * 2 + (i & 1) + 8
                },
                g,
            )
        },
    ),
    (
        &[Input::F64],
        (16, 8, 16),
        |g, t, i| {
            if i % 2 == 0 {
                (g, i * 2 + t)
            } else {
                (g + 8, i * 2 - 2 + t)
            }
        },
        |g, t, i| (t + i * 4, g),
    ),
    (
        &[Input::S8, Input::U8, Input::E4m3, Input::E5m2],
        (16, 8, 16),
        |g, t, i| (if i < 4 { g } else { g + 8 }, t * 4 + (i & 3)),
        |g, t, i| (t * 4 + (i & 3), g),
    ),
    (
        &[Input::S8, Input::U8, Input::E4m3, Input::E5m2],
        (16, 8, 32),
        |g, t, i| {
            let row = if i < 4 || (8..12).contains(&i) {
                g
            } else {
                g + 8
            };
            (
                row,
                if i < 8 {
                    t * 4 + (i & 3)
                } else {
                    t * 4 + (i & 3) + 16
                },
            )
        },
        |g, t, i| {
            (
                if i < 4 {
                    t * 4 + (i & 3)
                } else {
                    t * 4 + (i & 3) + 16
                },
                g,
            )
        },
    ),
    (
        &[Input::S4, Input::U4],
        (16, 8, 32),
        |g, t, i| (if i < 8 { g } else { g + 8 }, t * 8 + (i & 7)),
        |g, t, i| (t * 8 + (i & 7), g),
    ),
    (
        &[Input::S4, Input::U4],
        (16, 8, 64),
        |g, t, i| {
            let row = if i < 8 || (16..24).contains(&i) {
                g
            } else {
                g + 8
            };
            (
                row,
                if i < 16 {
                    t * 8 + (i & 7)
                } else {
                    t * 8 + (i & 7) + 32
                },
            )
        },
        |g, t, i| {
            (
                if i < 8 {
                    t * 8 + (i & 7)
                } else {
                    t * 8 + (i & 7) + 32
                },
                g,
            )
        },
    ),
];

fn accumulators(input: Input) -> &'static [Accumulator] {
    match input {
        Input::F16 | Input::E4m3 | Input::E5m2 => &[Accumulator::F16, Accumulator::F32],
        Input::Bf16 | Input::Tf32 => &[Accumulator::F32],
        Input::F64 => &[Accumulator::F64],
        _ => &[Accumulator::S32],
    }
}

/// Every instruction of the table, in every accumulator type.
fn instructions() -> impl Iterator<Item = (Mma, Position, Position)> {
    LAYOUTS.iter().flat_map(|&(inputs, (m, n, k), a, b)| {
        inputs.iter().flat_map(move |&input| {
            accumulators(input).iter().map(move |&sum| {
                let mma = Mma {
                    m,
                    n,
                    k,
                    a: input,
                    b: input,
                    c: sum,
                    d: sum,
                    satfinite: false,
                };
                (mma, a, b)
            })
        })
    })
}

#[test]
fn layouts_are_the_isas() {
    for (mma, a, b) in instructions() {
        assert!(mma.is_supported(), "{mma:?}");
        for lane in 0..32 {
            let (group, thread) = (lane >> 2, lane % 4);
            for i in 0..mma.m * mma.k / 32 {
                assert_eq!(
                    mma.a_position(lane, i),
                    a(group, thread, i),
                    "{mma:?} lane {lane} a{i}"
                );
            }
            for i in 0..mma.k * mma.n / 32 {
                assert_eq!(
                    mma.b_position(lane, i),
                    b(group, thread, i),
                    "{mma:?} lane {lane} b{i}"
                );
            }
            for i in 0..mma.m * mma.n / 32 {
                let row = if i < 2 { group } else { group + 8 };
                assert_eq!(
                    Mma::accumulator_position(lane, i),
                    (row, thread * 2 + (i & 1))
                );
            }
        }
    }
}

/// An instruction outside the ISA is refused.
#[test]
fn combinations_outside_the_isa_are_refused() {
    let (mma, ..) = instructions()
        .find(|(mma, ..)| mma.a == Input::Bf16)
        .expect("bf16");
    for wrong in [
        Mma { k: 32, ..mma },
        Mma { m: 8, ..mma },
        Mma {
            c: Accumulator::F16,
            ..mma
        },
        Mma {
            d: Accumulator::S32,
            ..mma
        },
        Mma {
            b: Input::F16,
            ..mma
        },
    ] {
        assert!(!wrong.is_supported(), "{wrong:?}");
    }
}

/// The bits and the value of `x` in a float input type.
fn encode(x: f32, input: Input) -> (u32, f64) {
    match input {
        Input::F16 => (f16::from_f32(x).to_bits().into(), f16::from_f32(x).into()),
        Input::Bf16 => (bf16::from_f32(x).to_bits().into(), bf16::from_f32(x).into()),
        // The lower bits of a tf32 register are garbage to be ignored.
        Input::Tf32 => (x.to_bits(), f32::from_bits(x.to_bits() & !0x1fff).into()),
        Input::E4m3 | Input::E5m2 => {
            let format = if input == Input::E4m3 {
                Format::E4M3
            } else {
                Format::E5M2
            };
            let bits = convert::to_f8(x, format, false);
            (bits.into(), convert::from_f8::<f64>(bits, format, false))
        }
        _ => unreachable!("an integer type"),
    }
}

/// `values[row * columns + column]` put into lane registers by the ISA's layout.
fn scatter(
    elements: usize,
    bits: usize,
    position: impl Fn(usize, usize) -> (usize, usize),
    value: impl Fn(usize, usize) -> u32,
) -> Vec<[u32; 32]> {
    let per_register = 32 / bits;
    let mut registers = vec![[0; 32]; elements / per_register];
    for i in 0..elements {
        for (lane, word) in registers[i / per_register].iter_mut().enumerate() {
            let (row, column) = position(lane, i);
            *word |= value(row, column) << (i % per_register * bits);
        }
    }
    registers
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Sums of `k` exact products in f32 differ from f64 by at most `k` roundings of the largest
    /// partial sum, and an f16 result by one more rounding to 11 bits.
    #[test]
    fn float_products(values in proptest::collection::vec(-2f32..2.0, 1200)) {
        for (mma, a_at, b_at) in instructions() {
            if matches!(mma.c, Accumulator::F64 | Accumulator::S32) {
                continue;
            }
            let a = |row: usize, column: usize| encode(values[row * mma.k + column], mma.a);
            let b = |row: usize, column: usize| encode(values[600 + row * 8 + column], mma.b);
            let c = |row: usize, column: usize| encode(values[1000 + row * 8 + column], Input::F16);
            let lane = |position: Position| move |lane: usize, i| position(lane >> 2, lane % 4, i);
            let a_registers = scatter(mma.m * mma.k / 32, mma.a.bits(), lane(a_at), |r, c| a(r, c).0);
            let b_registers = scatter(mma.k * mma.n / 32, mma.b.bits(), lane(b_at), |r, c| b(r, c).0);
            let f16_sums = mma.c == Accumulator::F16;
            let sum_bits = if f16_sums { 16 } else { 32 };
            let c_registers = scatter(4, sum_bits, Mma::accumulator_position, |row, column| {
                let (bits, value) = c(row, column);
                if f16_sums { bits } else { (value as f32).to_bits() }
            });
            prop_assert_eq!(a_registers.len(), mma.a_registers());
            prop_assert_eq!(b_registers.len(), mma.b_registers());
            let mut d = vec![[0; 32]; c_registers.len()];
            multiply_float(&mma, &a_registers, &b_registers, &c_registers, &mut d);
            for (l, i) in (0..32).flat_map(|l| (0..4).map(move |i| (l, i))) {
                let (row, column) = Mma::accumulator_position(l, i);
                let products = (0..mma.k).map(|k| a(row, k).1 * b(k, column).1);
                let exact = c(row, column).1 + products.clone().sum::<f64>();
                let size = c(row, column).1.abs() + products.map(f64::abs).sum::<f64>();
                let got = if f16_sums {
                    f16::from_bits((d[i / 2][l] >> (16 * (i % 2))) as u16).to_f64()
                } else {
                    f32::from_bits(d[i][l]).into()
                };
                let bound = size * mma.k as f64 * 2f64.powi(-24)
                    + if f16_sums { exact.abs() * 2f64.powi(-11) + 2f64.powi(-24) } else { 0.0 };
                prop_assert!((got - exact).abs() <= bound, "{mma:?} {row},{column}: {got} {exact}");
            }
        }
    }

    #[test]
    fn integer_products(values in proptest::collection::vec(any::<u8>(), 1600), sums: [[i32; 8]; 16]) {
        for (mma, a_at, b_at) in instructions().filter(|(mma, ..)| mma.c == Accumulator::S32) {
            let narrow = mma.a.bits() == 4;
            let types = if narrow { [Input::S4, Input::U4] } else { [Input::S8, Input::U8] };
            let of = |byte: u8, input: Input| match input {
                Input::S8 => i64::from(byte as i8),
                Input::U8 => byte.into(),
                Input::S4 => ((byte << 4) as i8 >> 4).into(),
                _ => (byte & 0xf).into(),
            };
            for (b_type, satfinite) in types.into_iter().zip([false, true]) {
                let mma = Mma { b: b_type, satfinite, ..mma };
                let mask = if narrow { 0xf } else { 0xff };
                let lane = |position: Position| move |lane: usize, i| position(lane >> 2, lane % 4, i);
                let a = |row: usize, column: usize| values[row * mma.k + column];
                let b = |row: usize, column: usize| values[1024 + row * 8 + column];
                let a_registers = scatter(mma.m * mma.k / 32, mma.a.bits(), lane(a_at), |r, c| u32::from(a(r, c) & mask));
                let b_registers = scatter(mma.k * mma.n / 32, mma.b.bits(), lane(b_at), |r, c| u32::from(b(r, c) & mask));
                let elements = mma.accumulator_elements();
                let c = scatter(elements, 32, Mma::accumulator_position, |r, c| sums[r][c] as u32);
                let mut d = vec![[0; 32]; elements];
                multiply_int(&mma, &a_registers, &b_registers, &c, &mut d);
                for l in 0..32 {
                    for (i, d) in d.iter().enumerate() {
                        let (row, column) = Mma::accumulator_position(l, i);
                        let exact = i64::from(sums[row][column])
                            + (0..mma.k).map(|k| of(a(row, k), mma.a) * of(b(k, column), mma.b)).sum::<i64>();
                        let expected = if satfinite { exact.clamp(i32::MIN.into(), i32::MAX.into()) } else { exact };
                        prop_assert_eq!(d[l] as i32, expected as i32, "{:?}", mma);
                    }
                }
            }
        }
    }

    #[test]
    fn f64_products(values in proptest::collection::vec(-2f64..2.0, 600)) {
        for (mma, a_at, b_at) in instructions().filter(|(mma, ..)| mma.c == Accumulator::F64) {
            let lane = |position: Position| move |lane: usize, i| position(lane >> 2, lane % 4, i);
            let a = |row: usize, column: usize| values[row * mma.k + column];
            let b = |row: usize, column: usize| values[300 + row * 8 + column];
            let c = |row: usize, column: usize| values[430 + row * 8 + column];
            let fill = |elements: usize, position: &dyn Fn(usize, usize) -> (usize, usize), value: &dyn Fn(usize, usize) -> f64| {
                (0..elements).map(|i| std::array::from_fn(|l| {
                    let (row, column) = position(l, i);
                    value(row, column).to_bits()
                })).collect::<Vec<[u64; 32]>>()
            };
            let a_registers = fill(mma.m * mma.k / 32, &lane(a_at), &a);
            let b_registers = fill(mma.k * mma.n / 32, &lane(b_at), &b);
            let c_registers = fill(mma.m * mma.n / 32, &Mma::accumulator_position, &c);
            let mut d = vec![[0; 32]; c_registers.len()];
            multiply_f64(&mma, &a_registers, &b_registers, &c_registers, &mut d);
            for l in 0..32 {
                for (i, d) in d.iter().enumerate() {
                    let (row, column) = Mma::accumulator_position(l, i);
                    let exact = c(row, column) + (0..mma.k).map(|k| a(row, k) * b(k, column)).sum::<f64>();
                    prop_assert!((f64::from_bits(d[l]) - exact).abs() < 1e-13, "{:?}", mma);
                }
            }
        }
    }
}
