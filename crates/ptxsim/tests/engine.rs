//! Kernels that nvcc compiled, against the same computed here.

mod support;

use proptest::prelude::*;
use ptxsim::{Checks, Fault, FaultKind, Gpu, LaunchConfig, LaunchReport};
use support::*;

fn run(
    gpu: &Gpu,
    name: &str,
    grid: u32,
    block: u32,
    shared_bytes: u32,
    values: &[&[u8]],
) -> Result<LaunchReport, Fault> {
    let kernel = kernel(gpu, BASICS, name);
    let config = LaunchConfig {
        grid: [grid, 1, 1],
        block: [block, 1, 1],
        shared_bytes,
        ..LaunchConfig::default()
    };
    gpu.launch(&kernel, &config, &arguments(&kernel, values))
}

#[test]
fn saxpy() {
    let gpu = gpu();
    let x: Vec<f32> = (0..1000).map(|i| i as f32 * 0.25).collect();
    let y: Vec<f32> = (0..1000).map(|i| 1000.0 - i as f32).collect();
    let (dx, dy) = (upload(&gpu, &x), upload(&gpu, &y));
    let values: [&[u8]; 4] = [
        &1000i32.to_le_bytes(),
        &3.0f32.to_le_bytes(),
        &dx.0.to_le_bytes(),
        &dy.0.to_le_bytes(),
    ];
    run(&gpu, "saxpy", 8, 128, 0, &values).unwrap_or_else(|fault| panic!("{fault}"));
    let expected: Vec<f32> = x
        .iter()
        .zip(&y)
        .map(|(x, y)| 3.0f32.mul_add(*x, *y))
        .collect();
    assert_eq!(download::<f32>(&gpu, dy, 1000), expected);
}

#[test]
fn block_sum_with_shuffles_and_a_barrier() {
    let gpu = gpu();
    let x: Vec<f32> = (0..700).map(|i| (i % 7) as f32).collect();
    let (dx, out) = (upload(&gpu, &x), gpu.alloc(12).unwrap());
    let values: [&[u8]; 3] = [
        &700i32.to_le_bytes(),
        &dx.0.to_le_bytes(),
        &out.0.to_le_bytes(),
    ];
    run(&gpu, "block_sum", 3, 256, 0, &values).unwrap_or_else(|fault| panic!("{fault}"));
    let expected: Vec<f32> = x.chunks(256).map(|chunk| chunk.iter().sum()).collect();
    assert_eq!(download::<f32>(&gpu, out, 3), expected);
}

#[test]
fn dynamic_shared_memory() {
    let gpu = gpu();
    let data: Vec<i32> = (0..96).collect();
    let ptr = upload(&gpu, &data);
    let values: [&[u8]; 2] = [&96i32.to_le_bytes(), &ptr.0.to_le_bytes()];
    run(&gpu, "reverse_dynamic", 1, 96, 384, &values).unwrap_or_else(|fault| panic!("{fault}"));
    let expected: Vec<i32> = (0..96).rev().collect();
    assert_eq!(download::<i32>(&gpu, ptr, 96), expected);
}

#[test]
fn function_calls_in_diverged_lanes() {
    let gpu = gpu();
    let x: Vec<f32> = (0..64).map(|i| i as f32 / 16.0).collect();
    let (dx, dy) = (upload(&gpu, &x), gpu.alloc(256).unwrap());
    run(
        &gpu,
        "calls",
        1,
        64,
        0,
        &[&dx.0.to_le_bytes(), &dy.0.to_le_bytes()],
    )
    .unwrap_or_else(|fault| panic!("{fault}"));
    let poly = |x: f32, degree: i32| {
        let table = [1.0f32, 2.0, 4.0, 8.0];
        (0..=degree)
            .rev()
            .fold(0.0f32, |sum, k| sum.mul_add(x, table[k as usize & 3]))
    };
    let expected: Vec<f32> = (0..64)
        .map(|i| {
            let x = x[i as usize];
            if i % 3 == 0 {
                poly(x, i % 5)
            } else {
                poly(x, 2) - 1.0
            }
        })
        .collect();
    assert_eq!(download::<f32>(&gpu, dy, 64), expected);
}

#[test]
fn calls_through_pointers() {
    let gpu = gpu();
    let data: Vec<i32> = (0..32).collect();
    let ptr = upload(&gpu, &data);
    run(&gpu, "through_pointers", 1, 32, 0, &[&ptr.0.to_le_bytes()])
        .unwrap_or_else(|fault| panic!("{fault}"));
    let expected: Vec<i32> = (0..32)
        .map(|i| if i % 2 == 0 { i + 3 } else { i * 3 })
        .collect();
    assert_eq!(download::<i32>(&gpu, ptr, 32), expected);
}

#[test]
fn atomics_on_a_module_variable() {
    let gpu = gpu();
    let module = load(&gpu, BASICS);
    let kernel = module.kernel("count").unwrap();
    let config = LaunchConfig {
        grid: [50, 1, 1],
        block: [64, 1, 1],
        ..LaunchConfig::default()
    };
    gpu.launch(&kernel, &config, &args![kernel, 40i32])
        .unwrap_or_else(|fault| panic!("{fault}"));
    let (counter, bytes) = module.global("counter").unwrap();
    assert_eq!(bytes, 4);
    assert_eq!(download::<i32>(&gpu, counter, 1), [2000]);
}

#[test]
fn printf() {
    let gpu = gpu();
    let report = run(&gpu, "say", 1, 2, 0, &[&7i32.to_le_bytes()]).unwrap();
    let line = |thread| format!("thread {thread} of 2:  3.50 text 1099511627776\n");
    assert_eq!(report.printed, line(0) + &line(1));
}

#[test]
fn what_was_printed_before_a_fault_is_kept() {
    let (before, say) = BASICS.split_at(BASICS.find(".entry say(").unwrap());
    let ptx = format!("{before}{}", say.replacen("ret;", "trap;", 1));
    let gpu = gpu();
    let kernel = kernel(&gpu, &ptx, "say");
    let fault = gpu
        .launch(&kernel, &LaunchConfig::default(), &args![kernel, 7i32])
        .unwrap_err();
    assert!(matches!(&*fault.kind, FaultKind::Trap), "{fault}");
    assert_eq!(fault.printed, "thread 0 of 1:  3.50 text 1099511627776\n");
}

#[test]
fn device_assert() {
    let gpu = gpu();
    assert!(run(&gpu, "must_be_positive", 1, 1, 0, &[&1i32.to_le_bytes()]).is_ok());
    let fault = run(&gpu, "must_be_positive", 1, 1, 0, &[&0i32.to_le_bytes()]).unwrap_err();
    assert!(matches!(&*fault.kind, FaultKind::Assert { message, .. } if message == "value > 0"));
}

#[test]
fn local_arrays() {
    let gpu = gpu();
    let order: Vec<i32> = (0..16).map(|i| i * 5 % 16).collect();
    let (dorder, out) = (upload(&gpu, &order), gpu.alloc(128).unwrap());
    run(
        &gpu,
        "local_array",
        1,
        32,
        0,
        &[&dorder.0.to_le_bytes(), &out.0.to_le_bytes()],
    )
    .unwrap_or_else(|fault| panic!("{fault}"));
    let expected: Vec<i32> = (0..32)
        .map(|thread| {
            let mut values: Vec<i32> = (0..16).map(|i| i * i).collect();
            for i in 0..16 {
                values[order[i as usize] as usize] += i + thread;
            }
            values[order[thread as usize & 15] as usize]
        })
        .collect();
    assert_eq!(download::<i32>(&gpu, out, 32), expected);
}

#[test]
fn parameters_by_value_and_address() {
    let gpu = gpu();
    let out = gpu.alloc(80).unwrap();
    let kernel = kernel(&gpu, BASICS, "by_value");
    assert_eq!(kernel.params().len(), 1);
    let mut args = vec![0; kernel.params_size() as usize];
    args[..4].copy_from_slice(&2.5f32.to_le_bytes());
    args[4..8].copy_from_slice(&20i32.to_le_bytes());
    args[8..16].copy_from_slice(&out.0.to_le_bytes());
    for i in 0..100 {
        args[16 + i] = (i as u8).wrapping_mul(3);
    }
    let config = LaunchConfig {
        block: [32, 1, 1],
        ..LaunchConfig::default()
    };
    gpu.launch(&kernel, &config, &args)
        .unwrap_or_else(|fault| panic!("{fault}"));
    let expected: Vec<f32> = (0..20)
        .map(|i| 2.5 * i as f32 + f32::from((i as u8).wrapping_mul(3) as i8))
        .collect();
    assert_eq!(download::<f32>(&gpu, out, 20), expected);
}

#[test]
fn the_last_block_adds_up() {
    let gpu = gpu();
    for seed in 0..20 {
        let (partial, ticket) = (gpu.alloc(400).unwrap(), upload(&gpu, &[0u32]));
        let out = gpu.alloc(4).unwrap();
        let kernel = kernel(&gpu, BASICS, "sum_of_blocks");
        let config = LaunchConfig {
            grid: [100, 1, 1],
            block: [64, 1, 1],
            seed,
            ..LaunchConfig::default()
        };
        gpu.launch(&kernel, &config, &args![kernel, partial.0, ticket.0, out.0])
            .unwrap_or_else(|fault| panic!("{fault}"));
        assert_eq!(download::<f32>(&gpu, out, 1), [5050.0]);
    }
}

fn chosen(v: i32) -> i32 {
    match v {
        0 => 17,
        1 => v * 5 + 2,
        2 => !v,
        3 => v << 7,
        4 => v - 100,
        5 => (v.wrapping_mul(12345)).count_ones() as i32,
        6 => v.leading_zeros() as i32,
        7 => v.reverse_bits(),
        _ => -1,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn divergence_reconverges(data in prop::collection::vec(-2i32..10, 96), seed: u64) {
        let gpu = gpu();
        let ptr = upload(&gpu, &data);
        let kernel = kernel(&gpu, BASICS, "choose");
        let config = LaunchConfig { block: [96, 1, 1], seed, ..LaunchConfig::default() };
        gpu.launch(&kernel, &config, &args![kernel, ptr.0]).unwrap();
        let expected: Vec<i32> = data.iter().map(|&v| chosen(v)).collect();
        prop_assert_eq!(download::<i32>(&gpu, ptr, 96), expected);
    }
}

/// `rounds` random bf16 values, as bits.
fn bf16_values(count: usize, mut state: u64) -> Vec<u16> {
    (0..count)
        .map(|_| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            half::bf16::from_f32(((state >> 40) as f32 / (1 << 23) as f32) - 1.0).to_bits()
        })
        .collect()
}

fn matmul(
    m: usize,
    n: usize,
    k: usize,
    checks: Checks,
    seed: u64,
) -> (Vec<f32>, Vec<u16>, Vec<u16>) {
    let gpu = gpu();
    let (a, b) = (bf16_values(m * k, 1), bf16_values(n * k, 2));
    let (da, db, dc) = (
        upload(&gpu, &a),
        upload(&gpu, &b),
        gpu.alloc((m * n * 4) as u64).unwrap(),
    );
    let kernel = kernel(&gpu, MATMUL, "matmul");
    let config = LaunchConfig {
        grid: [n as u32 / 64, m as u32 / 64, 1],
        block: [128, 1, 1],
        checks,
        seed,
        ..LaunchConfig::default()
    };
    let args = args![kernel, m as i32, n as i32, k as i32, da.0, db.0, dc.0];
    let start = std::time::Instant::now();
    gpu.launch(&kernel, &config, &args)
        .unwrap_or_else(|fault| panic!("{fault}"));
    println!("matmul {m} x {n} x {k}, {checks:?}: {:?}", start.elapsed());
    (download(&gpu, dc, m * n), a, b)
}

#[test]
fn tensor_core_matmul() {
    let (m, n, k) = (128, 64, 96);
    let (c, a, b) = matmul(m, n, k, Checks::all(), 7);
    let value = |bits: u16| f64::from(half::bf16::from_bits(bits).to_f32());
    for row in 0..m {
        for column in 0..n {
            let products = (0..k).map(|i| value(a[row * k + i]) * value(b[column * k + i]));
            let (exact, scale) =
                products.fold((0.0, 0.0), |(sum, scale), p| (sum + p, scale + p.abs()));
            let error = (f64::from(c[row * n + column]) - exact).abs();
            // k roundings to f32, each of half a unit in the last place.
            assert!(
                error <= scale * k as f64 * 2f64.powi(-24),
                "{row},{column}: {error}"
            );
        }
    }
}

#[test]
fn matmul_is_the_same_for_every_seed() {
    let first = matmul(128, 128, 64, Checks::none(), 0).0;
    for seed in 1..5 {
        assert_eq!(matmul(128, 128, 64, Checks::none(), seed).0, first);
    }
}

/// Not a test of speed, which depends on the machine: the figures are printed with
/// `cargo test --release -p ptxsim --test engine large -- --nocapture`.
#[test]
fn large_matmul() {
    let fast = matmul(512, 512, 512, Checks::none(), 0).0;
    assert_eq!(matmul(512, 512, 512, Checks::all(), 3).0, fast);
}
