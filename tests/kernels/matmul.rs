//! The unfused f32 matrix product.

use crate::device::{Device, numbers};
use fuselora_kernels::abi::MatmulShape;
use fuselora_kernels::matmul::{Layout, matmul};
use proptest::prelude::*;

pub const KERNELS: &[&str] = &["matmul_f32_nn", "matmul_f32_nt", "matmul_f32_tn"];

/// A factor as the reference and the device see it: row-major `[rows, cols]`, held transposed on
/// the device if asked for.
fn held(factor: &[f32], rows: usize, cols: usize, transposed: bool) -> Vec<f32> {
    match transposed {
        false => factor.to_vec(),
        true => (0..rows * cols)
            .map(|i| factor[i % rows * cols + i / rows])
            .collect(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Within the bound that any order of f32 additions keeps: k roundings of the sum of |a b|.
    /// Every seed of blocks and warps gives the same bits.
    #[test]
    fn is_the_product(
        m in 1usize..140,
        n in 1usize..140,
        k in 1usize..80,
        layout in prop::sample::select(vec![Layout::Nn, Layout::Nt, Layout::Tn]),
        seed: u64,
    ) {
        let device = Device::open();
        let (a, b) = (numbers(seed, m * k), numbers(!seed, k * n));
        let a_device = device.upload(&held(&a, m, k, layout == Layout::Tn));
        let b_device = device.upload(&held(&b, k, n, layout == Layout::Nt));
        let shape = MatmulShape { m: m as u32, n: n as u32, k: k as u32 };
        let run = |order: u64| {
            device.shuffle(order);
            let mut c = device.output::<f32>(m * n);
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
        for (i, &found) in c.iter().enumerate() {
            let products = (0..k).map(|d| f64::from(a[i / n * k + d]) * f64::from(b[d * n + i % n]));
            let (sum, magnitude) =
                products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
            let bound = (k + 1) as f64 * f64::from(f32::EPSILON) / 2.0 * magnitude;
            let error = (f64::from(found) - sum).abs();
            prop_assert!(error <= bound, "c[{}, {}] = {found}, not {sum}", i / n, i % n);
        }
        prop_assert_eq!(c, run(!seed)?);
    }
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
