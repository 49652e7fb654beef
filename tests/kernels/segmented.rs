//! Low-rank updates that differ from row to row.

use crate::device::Device;
use crate::storage::{Storage, stored};
use cudarc::driver::CudaSlice;
use fuselora_kernels::Element;
use fuselora_kernels::abi::{LORA_MAX_SEGMENTS, LORA_SEGMENT_OUTS};
use fuselora_kernels::lora_linear::{Lora, Segment, add_segments};
use half::{bf16, f16};
use proptest::prelude::*;
use std::ops::Range;

pub const KERNELS: &[&str] = &[
    "lora_segmented_bf16",
    "lora_segmented_f16",
    "lora_segmented_f32",
];

/// Rows that no update belongs to, the rows of one and its rank.
type Part = (usize, usize, usize);

struct Update {
    rows: Range<usize>,
    rank: usize,
    a: Vec<f32>,
    b: Vec<f32>,
}

fn updates(parts: &[Part], [in_features, out_features]: [usize; 2], seed: u64) -> Vec<Update> {
    let mut begin = 0;
    parts
        .iter()
        .zip(1..)
        .map(|(&(gap, rows, rank), key)| {
            let first = begin + gap;
            begin = first + rows;
            Update {
                rows: first..begin,
                rank,
                a: stored(seed ^ key, rank * in_features),
                b: stored(!seed ^ key, out_features * rank),
            }
        })
        .collect()
}

const SCALING: f32 = 0.75;

/// Every element is within the rounding of its two sums, in any order, and one of the storage type.
fn agrees<T: Storage>(
    parts: &[Part],
    [in_features, out_features]: [usize; 2],
    seed: u64,
) -> Result<(), TestCaseError> {
    let device = Device::open();
    let updates = updates(parts, [in_features, out_features], seed);
    let tokens = updates.last().map_or(0, |own| own.rows.end) + 2;
    let x = stored::<T>(seed, tokens * in_features);
    let y = stored::<T>(!seed, tokens * out_features);
    let held: Vec<(CudaSlice<f32>, CudaSlice<f32>)> = updates
        .iter()
        .map(|own| (device.upload(&own.a), device.upload(&own.b)))
        .collect();
    let segments: Vec<Segment> = updates
        .iter()
        .zip(&held)
        .map(|(own, (a, b))| Segment {
            rows: own.rows.start as u32..own.rows.end as u32,
            lora: Lora {
                a: device.operand(a),
                b: device.operand(b),
                rank: own.rank as u32,
                scaling: SCALING,
                dropout: None,
            },
        })
        .collect();
    let x_device = device.upload(&x);
    let run = |order: u64| {
        device.shuffle(order);
        let mut out = device.upload(&y);
        let shape = [tokens, in_features, out_features].map(|extent| extent as u32);
        add_segments(
            &device.kernels,
            shape,
            device.operand(&x_device),
            &segments,
            device.operand_mut(&mut out),
        )
        .map(|()| device.download(&out))
    };
    let found = run(seed)?;
    prop_assert!(found == run(!seed)?, "another order, other bits");

    for (i, found) in found.iter().enumerate() {
        let (row, column) = (i / out_features, i % out_features);
        let Some(own) = updates.iter().find(|own| own.rows.contains(&row)) else {
            prop_assert_eq!(found.value(), y[i].value(), "row {} has no update", row);
            continue;
        };
        let (mut sum, mut size) = (0.0, 0.0);
        for r in 0..own.rank {
            let products = (0..in_features)
                .map(|f| x[row * in_features + f].value() * f64::from(own.a[r * in_features + f]));
            let (h, h_size) = products.fold((0.0, 0.0), |(h, size), p| (h + p, size + p.abs()));
            let b = f64::from(own.b[column * own.rank + r]);
            sum += h * b;
            size += h_size * b.abs();
        }
        let scaling = f64::from(SCALING);
        let expected = y[i].value() + scaling * sum;
        let sums = (in_features + own.rank + 4) as f64
            * f32::ROUNDING
            * (scaling * size + y[i].value().abs());
        let bound = match T::ELEMENT {
            Element::F32 => sums,
            // f16 has no exponent left for small numbers.
            _ => sums + T::ROUNDING * (expected.abs() + sums) + 3.1e-8,
        };
        let error = (found.value() - expected).abs();
        prop_assert!(
            error <= bound,
            "y[{row}, {column}] = {}, not {expected}: {error:e} off where {bound:e} is allowed",
            found.value()
        );
    }
    Ok(())
}

fn parts() -> impl Strategy<Value = Vec<Part>> {
    prop::collection::vec((0usize..3, 0usize..40, 1usize..40), 1..5)
}

/// Slices of x that are whole and ragged, rows that start at multiples of 16 bytes and not.
fn features() -> impl Strategy<Value = usize> {
    prop_oneof![1usize..40, Just(256), 250usize..300]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn agrees_in_f32(parts in parts(), shape in [features(), features()], seed: u64) {
        agrees::<f32>(&parts, shape, seed)?;
    }

    #[test]
    fn agrees_in_bf16(parts in parts(), shape in [features(), features()], seed: u64) {
        agrees::<bf16>(&parts, shape, seed)?;
    }

    #[test]
    fn agrees_in_f16(parts in parts(), shape in [features(), features()], seed: u64) {
        agrees::<f16>(&parts, shape, seed)?;
    }
}

#[test]
fn more_segments_than_a_launch_takes_and_more_columns_than_a_block() {
    let parts = vec![(0, 1, 3); LORA_MAX_SEGMENTS as usize + 2];
    agrees::<f32>(&parts, [8, LORA_SEGMENT_OUTS as usize + 5], 7).unwrap();
    agrees::<bf16>(&[(1, 17, 256)], [24, 9], 8).unwrap();
}

#[test]
fn names_what_does_not_fit() {
    let device = Device::open();
    let values = device.upload(&[0.0f32; 64]);
    let mut y = device.output::<f32>(16);
    let segment = |rows: Range<u32>, rank: u32| Segment {
        rows,
        lora: Lora {
            a: device.operand(&values),
            b: device.operand(&values),
            rank,
            scaling: 1.0,
            dropout: None,
        },
    };
    let mut refusal = |segments: &[Segment]| {
        let x = device.upload(&[0.0f32; 16]);
        let (x, y) = (device.operand(&x), device.operand_mut(&mut y));
        let result = add_segments(&device.kernels, [4, 4, 4], x, segments, y);
        result.expect_err("it does not fit").to_string()
    };
    for (segments, named) in [
        (vec![segment(2..5, 16)], "a segment's first row"),
        (
            vec![segment(0..2, 16), segment(1..3, 16)],
            "a segment's first row",
        ),
        (vec![segment(0..1, 257)], "rank"),
        (vec![segment(0..1, 8)], "lora_a"),
    ] {
        let message = refusal(&segments);
        assert!(message.contains(named), "{message}");
    }
}
