//! The unfused matrix product.

use crate::device::Device;
use crate::storage::{Storage, stored};
use fuselora_kernels::Element;
use fuselora_kernels::abi::MatmulShape;
use fuselora_kernels::matmul::{Layout, matmul};
use half::{bf16, f16};
use proptest::prelude::*;

pub const KERNELS: &[&str] = &[
    "matmul_bf16_nn_large",
    "matmul_bf16_nn_small",
    "matmul_bf16_nn_unaligned",
    "matmul_bf16_nt_large",
    "matmul_bf16_nt_small",
    "matmul_bf16_nt_unaligned",
    "matmul_f16_nn_large",
    "matmul_f16_nn_small",
    "matmul_f16_nn_unaligned",
    "matmul_f16_nt_large",
    "matmul_f16_nt_small",
    "matmul_f16_nt_unaligned",
    "matmul_f32_nn",
    "matmul_f32_nt",
    "matmul_f32_tn",
];

/// A factor as the reference and the device see it: row-major `[rows, cols]`, held transposed on
/// the device if asked for.
fn held<T: Copy>(factor: &[T], rows: usize, cols: usize, transposed: bool) -> Vec<T> {
    match transposed {
        false => factor.to_vec(),
        true => (0..rows * cols)
            .map(|i| factor[i % rows * cols + i / rows])
            .collect(),
    }
}

/// Holds a product to the bound that any order of f32 additions keeps, k roundings of the sum of |a b|, and one
/// rounding of the storage type. Every seed of blocks and warps gives the same bits.
fn agrees<T: Storage>(
    [m, n, k]: [usize; 3],
    layout: Layout,
    seed: u64,
) -> Result<(), TestCaseError> {
    let device = Device::open();
    let (a, b) = (stored::<T>(seed, m * k), stored::<T>(!seed, k * n));
    let a_device = device.upload(&held(&a, m, k, layout == Layout::Tn));
    let b_device = device.upload(&held(&b, k, n, layout == Layout::Nt));
    let shape = MatmulShape {
        m: m as u32,
        n: n as u32,
        k: k as u32,
    };
    let run = |order: u64| {
        device.shuffle(order);
        let mut c = device.output::<T>(m * n);
        matmul(
            &device.kernels,
            layout,
            shape,
            device.operand(&a_device),
            device.operand(&b_device),
            device.operand_mut(&mut c),
        )
        .map(|()| device.download(&c))
    };
    let c = run(seed)?;
    for (i, found) in c.iter().enumerate() {
        let products = (0..k).map(|d| a[i / n * k + d].value() * b[d * n + i % n].value());
        let (sum, magnitude) =
            products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
        let sums = (k + 1) as f64 * f32::ROUNDING * magnitude;
        let bound = match T::ELEMENT {
            Element::F32 => sums,
            // f16 has no exponent left for small numbers.
            _ => sums + T::ROUNDING * (sum.abs() + sums) + 3.1e-8,
        };
        let error = (found.value() - sum).abs();
        prop_assert!(
            error <= bound,
            "c[{}, {}] = {}, not {sum}",
            i / n,
            i % n,
            found.value()
        );
    }
    prop_assert!(c == run(!seed)?, "another order, other bits");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn is_the_product_in_f32(
        m in 1usize..140,
        n in 1usize..140,
        k in 1usize..80,
        layout in prop::sample::select(vec![Layout::Nn, Layout::Nt, Layout::Tn]),
        seed: u64,
    ) {
        agrees::<f32>([m, n, k], layout, seed)?;
    }

    #[test]
    fn is_the_product_in_16_bits(
        m in 1usize..140,
        (n, k) in prop_oneof![
            (1usize..140, 1usize..80),
            (1usize..18, 1usize..32).prop_map(|(n, k)| (8 * n, 8 * k)),
        ],
        layout in prop::sample::select(vec![Layout::Nn, Layout::Nt]),
        seed: u64,
    ) {
        agrees::<f16>([m, n, k], layout, seed)?;
        agrees::<bf16>([m, n, k], layout, seed)?;
    }
}

/// Enough tiles for the larger ones, which the extents above never reach.
#[test]
fn many_tiles() {
    agrees::<bf16>([130, 12296, 40], Layout::Nn, 1).unwrap();
    agrees::<f16>([130, 12296, 40], Layout::Nt, 3).unwrap();
}

#[test]
fn names_the_factor_that_does_not_fit() {
    let device = Device::open();
    let a = device.upload(&[0.0f32; 6]);
    let b = device.upload(&[0.0f32; 11]);
    let mut c = device.output::<f32>(8);
    let shape = MatmulShape { m: 2, n: 4, k: 3 };
    let error = matmul(
        &device.kernels,
        Layout::Nn,
        shape,
        device.operand(&a),
        device.operand(&b),
        device.operand_mut(&mut c),
    )
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "b holds 11 elements where 12 were expected"
    );
}
