//! `wgmma`: operands laid out by the canonical layouts that CUTLASS documents, products in f64.

use half::{bf16, f16};
use proptest::prelude::*;
use ptxsim::arith::{Format, convert};
use ptxsim::matrix::mma::{Accumulator, Input, Mma};
use ptxsim::matrix::swizzle::Swizzle;
use ptxsim::matrix::wgmma::{Descriptor, M, Operand, WARPS, Wgmma};

/// A CuTe layout: the offset of a linear index through nested extents and strides.
fn layout(mut index: usize, modes: &[(usize, usize)]) -> usize {
    modes.iter().fold(0, |offset, (extent, stride)| {
        let digit = index % extent;
        index /= extent;
        offset + digit * stride
    })
}

/// `Swizzle<bits, 4, 3>` of CuTe.
fn cute_swizzle(offset: usize, bits: u32) -> usize {
    let mask = ((1 << bits) - 1) << 7;
    offset ^ ((offset & mask) >> 3)
}

const MODES: [(Swizzle, u32, u64); 4] = [
    (Swizzle::None, 0, 0),
    (Swizzle::Bytes32, 1, 3),
    (Swizzle::Bytes64, 2, 2),
    (Swizzle::Bytes128, 3, 1),
];

/// The byte address of element `(mn, k)` as in CUTLASS's table of canonical GMMA layouts.
fn canonical(
    (mn, k): (usize, usize),
    bytes: usize,
    transposed: bool,
    swizzle_bits: u32,
    (leading, stride): (usize, usize),
) -> usize {
    // T is the number of elements in 128 bits, W the width of a swizzle row in units of T.
    let (t, w) = (16 / bytes, 1 << swizzle_bits);
    let many = usize::MAX;
    let offset = match (transposed, swizzle_bits) {
        // ((8,m),(T,2)) : ((1T,SBO),(1,LBO))
        (false, 0) => {
            layout(mn, &[(8, 16), (many, stride)]) + layout(k, &[(t, bytes), (2, leading)])
        }
        // ((8,m),(T,2)) : ((wT,SBO),(1,T))
        (false, _) => {
            layout(mn, &[(8, 16 * w), (many, stride)]) + layout(k, &[(t, bytes), (2, 16)])
        }
        // ((T,1,m),(8,k)) : ((1,T,SBO),(1T,LBO))
        (true, 0) => {
            layout(mn, &[(t, bytes), (many, stride)]) + layout(k, &[(8, 16), (many, leading)])
        }
        // ((T,w,m),(8,k)) : ((1,T,LBO),(wT,SBO))
        (true, _) => {
            layout(mn, &[(t, bytes), (w, 16), (many, leading)])
                + layout(k, &[(8, 16 * w), (many, stride)])
        }
    };
    cute_swizzle(offset, swizzle_bits)
}

/// CUTLASS's `CLayout_64xN`, column-major over 64 rows.
#[test]
fn accumulators_lie_as_in_cutlass() {
    for warp in 0..WARPS {
        for lane in 0..32 {
            for i in 0..128 {
                let thread = layout(32 * warp + lane, &[(4, 128), (8, 1), (4, 16)]);
                let offset = thread + layout(i, &[(2, 64), (2, 8), (32, 512)]);
                assert_eq!(Wgmma::d_position(warp, lane, i), (offset % 64, offset / 64));
            }
        }
    }
}

#[test]
fn descriptors_decode_field_by_field() {
    let bits = (0x1400u64 >> 4) | (0x80 >> 4) << 16 | (0x400 >> 4) << 32 | 3 << 49 | 1 << 62;
    let expected = Descriptor {
        start: 0x1400,
        leading: 0x80,
        stride: 0x400,
        base_offset: 3,
        swizzle: Swizzle::Bytes128,
    };
    assert_eq!(Descriptor::decode(bits), expected);
    assert_eq!(Descriptor::decode(2 << 62).swizzle, Swizzle::Bytes64);
    assert_eq!(Descriptor::decode(3 << 62).swizzle, Swizzle::Bytes32);
}

#[test]
fn combinations_outside_the_isa_are_refused() {
    let valid = Wgmma {
        n: 128,
        a: Input::Bf16,
        b: Input::Bf16,
        d: Accumulator::F32,
        negate_a: false,
        negate_b: false,
    };
    assert!(valid.is_supported());
    assert_eq!((valid.k(), valid.d_registers()), (16, 64));
    assert!(!Wgmma { n: 12, ..valid }.is_supported());
    assert!(!Wgmma { n: 264, ..valid }.is_supported());
    assert!(
        !Wgmma {
            d: Accumulator::F16,
            ..valid
        }
        .is_supported()
    );
    assert!(
        !Wgmma {
            b: Input::F16,
            ..valid
        }
        .is_supported()
    );
}

fn encode(x: f32, input: Input) -> (u32, f64) {
    match input {
        Input::F16 => (f16::from_f32(x).to_bits().into(), f16::from_f32(x).into()),
        Input::Bf16 => (bf16::from_f32(x).to_bits().into(), bf16::from_f32(x).into()),
        Input::Tf32 => (x.to_bits(), f32::from_bits(x.to_bits() & !0x1fff).into()),
        _ => {
            let bits = convert::to_f8(x, Format::E4M3, false);
            (
                bits.into(),
                convert::from_f8::<f64>(bits, Format::E4M3, false),
            )
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    /// Every input type, major-ness and swizzle; A from shared memory and from registers.
    #[test]
    fn products(
        values in proptest::collection::vec(-2f32..2.0, 64 * 32 + 32 * 24),
        n in 1usize..4,
        accumulate: bool,
        (negate_a, negate_b) in any::<(bool, bool)>(),
    ) {
        let n = 8 * n;
        for (input, d) in [
            (Input::F16, Accumulator::F32), (Input::F16, Accumulator::F16),
            (Input::Bf16, Accumulator::F32), (Input::Tf32, Accumulator::F32),
            (Input::E4m3, Accumulator::F32),
        ] {
            let wgmma = Wgmma { n, a: input, b: input, d, negate_a, negate_b };
            prop_assert!(wgmma.is_supported());
            let (k, bytes) = (wgmma.k(), input.bits() / 8);
            let a = |row: usize, column: usize| encode(values[row * k + column], input);
            let b = |row: usize, column: usize| encode(values[64 * 32 + row * n + column], input);
            for (swizzle, swizzle_bits, code) in MODES {
                for transposed in [false, true] {
                    // Only 16-bit types can be transposed. Distances that no two parts share.
                    if transposed && bytes != 2 {
                        continue;
                    }
                    let row = 16usize << swizzle_bits;
                    let (leading, stride) = match (transposed, swizzle_bits) {
                        (false, 0) => (2048, 128),
                        (false, _) => (0, 8 * row),
                        (true, 0) => (2048, 128),
                        (true, _) => (16 * row, 8 * row),
                    };
                    let fill = |rows: usize, element: &dyn Fn(usize, usize) -> u32| {
                        let mut memory = vec![0u8; 32768];
                        for mn in 0..rows {
                            for k in 0..k {
                                let at = canonical((mn, k), bytes, transposed, swizzle_bits, (leading, stride));
                                memory[at..at + bytes].copy_from_slice(&element(mn, k).to_le_bytes()[..bytes]);
                            }
                        }
                        memory
                    };
                    let descriptor = Descriptor::decode(
                        ((leading as u64) >> 4) << 16 | ((stride as u64) >> 4) << 32 | code << 62,
                    );
                    prop_assert_eq!(descriptor.swizzle, swizzle);
                    let load = |operand, rows, memory: Vec<u8>| {
                        wgmma.from_shared(operand, rows, descriptor, transposed, |at| {
                            let chunk = memory.get(at as usize..at as usize + 16).ok_or("outside")?;
                            <[u8; 16]>::try_from(chunk).map_err(|_| "short")
                        })
                    };
                    // A in two halves, as if by two warps.
                    let whole_a = fill(M, &|r, k| a(r, k).0);
                    let upper = load(Operand::A, 0..32, whole_a.clone()).expect("inside");
                    let lower = load(Operand::A, 32..M, whole_a).expect("inside");
                    let a_matrix = [upper, lower].concat();
                    let b_matrix = load(Operand::B, 0..n, fill(n, &|c, k| b(k, c).0)).expect("inside");
                    for (i, x) in a_matrix.iter().enumerate() {
                        prop_assert_eq!(f64::from(*x), a(i / k, i % k).1, "{:?} {}", wgmma, transposed);
                    }
                    for (i, x) in b_matrix.iter().enumerate() {
                        prop_assert_eq!(f64::from(*x), b(i % k, i / k).1, "{:?} {}", wgmma, transposed);
                    }
                }
            }
            let a_matrix: Vec<f32> = (0..M * k).map(|i| a(i / k, i % k).1 as f32).collect();
            let b_matrix: Vec<f32> = (0..n * k).map(|i| b(i % k, i / k).1 as f32).collect();
            // A in registers is four m16 fragments of mma.sync, one to a warp.
            let tile = Mma { m: 16, n: 8, k, a: input, b: input, c: d, d, satfinite: false };
            let mut registers = [[[0u32; 32]; 4]; WARPS];
            for (warp, registers) in registers.iter_mut().enumerate() {
                for (lane, i) in (0..32).flat_map(|lane| (0..16 / bytes).map(move |i| (lane, i))) {
                    let (row, column) = tile.a_position(lane, i);
                    let word = a(16 * warp + row, column).0 << (8 * (i * bytes % 4));
                    registers[i * bytes / 4][lane] |= word;
                }
            }
            let from_registers = registers.map(|registers| wgmma.a_from_registers(&registers));
            prop_assert_eq!(&from_registers.concat(), &a_matrix);
            for (warp, a_rows) in from_registers.iter().enumerate() {
                let start = f16::from_f32(0.75);
                let filled = if d == Accumulator::F16 { u32::from(start.to_bits()) * 0x1_0001 } else { 0.75f32.to_bits() };
                let mut sums = vec![[filled; 32]; wgmma.d_registers()];
                wgmma.multiply(a_rows, &b_matrix, accumulate, &mut sums);
                for (lane, i) in (0..32).flat_map(|lane| (0..n / 2).map(move |i| (lane, i))) {
                    let (row, column) = Wgmma::d_position(warp, lane, i);
                    let sign = if negate_a != negate_b { -1.0 } else { 1.0 };
                    let products = (0..k).map(|k| sign * a(row, k).1 * b(k, column).1);
                    let exact = products.clone().sum::<f64>() + if accumulate { 0.75 } else { 0.0 };
                    let size = products.map(f64::abs).sum::<f64>() + 0.75;
                    let (got, bound) = if d == Accumulator::F16 {
                        let bits = (sums[i / 2][lane] >> (16 * (i % 2))) as u16;
                        (f16::from_bits(bits).to_f64(), exact.abs() * 2f64.powi(-11) + 2f64.powi(-24))
                    } else {
                        (f32::from_bits(sums[i][lane]).into(), 0.0)
                    };
                    let bound = bound + size * (k + 1) as f64 * 2f64.powi(-24);
                    prop_assert!((got - exact).abs() <= bound, "{:?} {} {}", wgmma, got, exact);
                }
            }
        }
    }
}
