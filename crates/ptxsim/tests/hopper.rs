//! The instructions of compute capability 9.0: kernels that are right, against the host, and the same
//! kernels with one thing forgotten.

mod support;

use half::bf16;
use proptest::prelude::*;
use ptxsim::matrix::swizzle::Swizzle;
use ptxsim::matrix::tensor_map::TensorMap;
use ptxsim::{DevicePtr, Fault, FaultKind, Gpu, Kernel, LaunchConfig, Profile};
use support::{arguments, download, kernel, upload};

const HOPPER: &str = include_str!("ptx/hopper.ptx");

fn hopper() -> Gpu {
    Gpu::new(Profile::h100())
}

fn launch(
    gpu: &Gpu,
    kernel: &Kernel,
    grid: u32,
    block: u32,
    seed: u64,
    args: &[u8],
) -> Result<(), Fault> {
    let config = LaunchConfig {
        grid: [grid, 1, 1],
        block: [block, 1, 1],
        seed,
        ..LaunchConfig::default()
    };
    gpu.launch(kernel, &config, args).map(|_| ())
}

/// Runs a kernel over `(x, y)` with as much output as input, 256 threads to a block.
fn bulk(name: &str, x: &[f32], seed: u64) -> Result<Vec<f32>, Fault> {
    let gpu = hopper();
    let kernel = kernel(&gpu, HOPPER, name);
    let (from, to) = (upload(&gpu, x), upload(&gpu, &vec![0f32; x.len()]));
    let args = args![kernel, from.0, to.0];
    launch(&gpu, &kernel, x.len() as u32 / 256, 256, seed, &args)?;
    Ok(download(&gpu, to, x.len()))
}

fn ramp(count: usize) -> Vec<f32> {
    (0..count).map(|i| i as f32 + 1.0).collect()
}

#[test]
fn bulk_copies_arrive_when_they_are_waited_for() {
    let x = ramp(1024);
    let doubled: Vec<f32> = x.iter().map(|x| 2.0 * x).collect();
    for seed in 0..8 {
        assert_eq!(
            bulk("bulk_copy", &x, seed).unwrap_or_else(|f| panic!("{f}")),
            doubled
        );
    }
}

#[test]
fn copies_arrive_at_a_barrier_when_they_land() {
    let x = ramp(512);
    let reversed: Vec<f32> = (0..512)
        .map(|i| 2.0 * x[i / 256 * 256 + 255 - i % 256])
        .collect();
    for name in ["copy_arrive_counted", "copy_arrive_uncounted"] {
        for seed in 0..4 {
            let y = bulk(name, &x, seed).unwrap_or_else(|f| panic!("{f}"));
            assert_eq!(y, reversed, "{name}");
        }
    }
    assert!(shows(bulk("copy_arrive_no_wait", &x, 0), &reversed));
}

#[test]
fn one_thread_may_fence_for_those_it_waited_for() {
    let x = ramp(256);
    let doubled: Vec<f32> = x.iter().map(|x| 2.0 * x).collect();
    let y = bulk("bulk_copy_late_fence", &x, 0).unwrap_or_else(|f| panic!("{f}"));
    assert_eq!(y, doubled);
}

/// Reported, or seen in the result.
fn shows(outcome: Result<Vec<f32>, Fault>, right: &[f32]) -> bool {
    outcome.map_or(true, |result| result != right)
}

#[test]
fn what_is_forgotten_about_bulk_copies_shows() {
    let x = ramp(1024);
    let doubled: Vec<f32> = x.iter().map(|x| 2.0 * x).collect();
    for name in [
        "bulk_copy_no_wait",
        "bulk_copy_no_expect",
        "bulk_copy_no_store_wait",
    ] {
        assert!(shows(bulk(name, &x, 0), &doubled), "{name}");
    }
    let fault = bulk("bulk_copy_no_wait", &x, 0).expect_err("nobody waits");
    assert!(fault.to_string().contains("bulk"), "{fault}");
}

/// The check that only `fence.proxy.async` silences names the reader and the writer.
#[test]
fn a_missing_proxy_fence_is_reported() {
    let values: Vec<bf16> = (0..64 * 80).map(|i| bf16::from_f32(i as f32)).collect();
    let (a, b) = values.split_at(64 * 64);
    let of_bulk = bulk("bulk_copy_no_fence", &ramp(256), 0).expect_err("no fence");
    let of_early = bulk("bulk_copy_early_fence", &ramp(256), 0).expect_err("a useless fence");
    let of_wgmma = product("wgmma_no_fence", a, b, 0).expect_err("no fence");
    for (fault, line) in [
        (of_bulk, "cp.async.bulk"),
        (of_early, "cp.async.bulk"),
        (of_wgmma, "wgmma.mma_async"),
    ] {
        println!("{fault}\n");
        let FaultKind::MissingProxyFence { writer, .. } = &*fault.kind else {
            panic!("{fault}");
        };
        assert!(
            writer.location.instruction.starts_with("st.shared"),
            "{fault}"
        );
        let reader = fault.party.as_ref().expect("a reader");
        assert!(reader.location.instruction.contains(line), "{fault}");
    }
}

#[test]
fn an_mbarrier_that_never_completes_is_a_deadlock_that_says_what_it_lacks() {
    let gpu = hopper();
    let pipeline = kernel(&gpu, HOPPER, "pipeline");
    let (x, sum) = (upload(&gpu, &ramp(128)), upload(&gpu, &[0f32; 128]));
    // Without the producer's threads nobody fills the ring.
    let args = args![pipeline, x.0, sum.0, 1i32];
    let fault = launch(&gpu, &pipeline, 1, 128, 0, &args).expect_err("a deadlock");
    assert!(matches!(*fault.kind, FaultKind::Deadlock { .. }), "{fault}");
    assert!(fault.to_string().contains("1 arrivals"), "{fault}");
}

#[test]
fn a_producer_and_consumers_share_a_ring() {
    for (tiles, seed) in [(1, 0), (2, 1), (7, 2), (8, 3)] {
        let gpu = hopper();
        let pipeline = kernel(&gpu, HOPPER, "pipeline");
        let x = ramp(128 * tiles);
        let (from, to) = (upload(&gpu, &x), upload(&gpu, &[0f32; 128]));
        let args = args![pipeline, from.0, to.0, tiles as i32];
        launch(&gpu, &pipeline, 1, 256, seed, &args).unwrap_or_else(|f| panic!("{f}"));
        let expected: Vec<f32> = (0..128)
            .map(|i| (0..tiles).map(|t| x[128 * t + i]).sum())
            .collect();
        assert_eq!(download::<f32>(&gpu, to, 128), expected);
    }
}

/// A matrix of bf16 in memory and its map, with boxes of `[rows, 64]`.
fn map_of(address: DevicePtr, rows: u64, columns: u64, box_rows: u32) -> TensorMap {
    TensorMap {
        element_bytes: 2,
        rank: 2,
        address: address.0,
        dims: [columns, rows, 1, 1, 1],
        strides: [2, 2 * columns, 0, 0, 0],
        box_dims: [64, box_rows, 1, 1, 1],
        element_strides: [1; 5],
        swizzle: Swizzle::Bytes128,
        nan_fill: false,
    }
}

#[test]
fn tensor_copies_swizzle_fill_and_clip() {
    let (rows, columns) = (12u64, 72u64);
    let source: Vec<u16> = (0..rows * columns).map(|i| i as u16 + 1).collect();
    for (x, y) in [(0, 0), (8, 3), (40, 6), (-8, -2)] {
        let gpu = hopper();
        let kernel = kernel(&gpu, HOPPER, "tensor_copy");
        let from = upload(&gpu, &source);
        let to = upload(&gpu, &vec![0u16; source.len()]);
        let plain = upload(&gpu, &[0u32; 256]);
        let maps =
            [map_of(from, rows, columns, 8), map_of(to, rows, columns, 8)].map(|m| m.encode());
        let (x_bytes, y_bytes) = (i32::to_le_bytes(x), i32::to_le_bytes(y));
        let args = arguments(
            &kernel,
            &[
                &maps[0],
                &maps[1],
                &plain.0.to_le_bytes(),
                &x_bytes,
                &y_bytes,
            ],
        );
        launch(&gpu, &kernel, 1, 256, 0, &args).unwrap_or_else(|f| panic!("{f}"));
        let at = |row: i64, column: i64| {
            let inside = (0..rows as i64).contains(&row) && (0..columns as i64).contains(&column);
            if inside {
                source[(row * columns as i64 + column) as usize]
            } else {
                0
            }
        };
        // In shared memory, chunk c of row r lies at chunk c ^ r.
        let tile: Vec<u32> = download(&gpu, plain, 256);
        for (row, column) in (0..8).flat_map(|r| (0..64).map(move |c| (r, c))) {
            let half = row * 64 + ((column / 8) ^ row) * 8 + column % 8;
            let got = (tile[half / 2] >> (16 * (half % 2))) as u16;
            let expected = at(i64::from(y) + row as i64, i64::from(x) + column as i64);
            assert_eq!(got, expected, "({x}, {y}): {row}, {column}");
        }
        // The box goes back to (8, 1), what is outside is dropped.
        let back: Vec<u16> = download(&gpu, to, source.len());
        for (i, got) in back.iter().enumerate() {
            let (row, column) = (i as i64 / columns as i64 - 1, i as i64 % columns as i64 - 8);
            let covered = (0..8).contains(&row) && (0..64).contains(&column);
            let expected = if covered {
                at(i64::from(y) + row, i64::from(x) + column)
            } else {
                0
            };
            assert_eq!(*got, expected, "({x}, {y}): element {i}");
        }
    }
}

/// `A [64, 64]`, `B [16, 64]` (or `[64, 16]`) and the product of the kernel.
fn product(name: &str, a: &[bf16], b: &[bf16], seed: u64) -> Result<Vec<f32>, Fault> {
    product_of(HOPPER, name, a, b, seed)
}

fn product_of(ptx: &str, name: &str, a: &[bf16], b: &[bf16], seed: u64) -> Result<Vec<f32>, Fault> {
    let gpu = hopper();
    let kernel = kernel(&gpu, ptx, name);
    let bits = |x: &[bf16]| x.iter().map(|x| x.to_bits()).collect::<Vec<u16>>();
    let (a, b, c) = (
        upload(&gpu, &bits(a)),
        upload(&gpu, &bits(b)),
        upload(&gpu, &[0f32; 1024]),
    );
    let args = args![kernel, a.0, b.0, c.0];
    launch(&gpu, &kernel, 1, 128, seed, &args)?;
    Ok(download(&gpu, c, 1024))
}

fn check_product(
    c: &[f32],
    a: &[bf16],
    b: impl Fn(usize, usize) -> bf16,
) -> Result<(), TestCaseError> {
    for (i, got) in c.iter().enumerate() {
        let (row, column) = (i / 16, i % 16);
        let terms = (0..64).map(|k| a[64 * row + k].to_f64() * b(k, column).to_f64());
        let exact: f64 = terms.clone().sum();
        let size: f64 = terms.map(f64::abs).sum();
        // 64 roundings in f32.
        let bound = 64.0 * size * 2f64.powi(-24);
        prop_assert!(
            (f64::from(*got) - exact).abs() <= bound,
            "{row}, {column}: {got} {exact}"
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn warpgroups_multiply(values in proptest::collection::vec(-2f32..2.0, 64 * 80), seed: u64) {
        let values: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
        let (a, b) = values.split_at(64 * 64);
        let c = product("wgmma_shared", a, b, seed).unwrap_or_else(|f| panic!("{f}"));
        check_product(&c, a, |k, n| b[64 * n + k])?;
        let c = product("wgmma_registers", a, b, seed).unwrap_or_else(|f| panic!("{f}"));
        check_product(&c, a, |k, n| b[16 * k + n])?;
    }
}

/// Registers change hands between `wgmma` and other instructions at a fence and a wait.
#[test]
fn registers_of_wgmma_need_a_fence_before_and_a_wait_behind() {
    let values: Vec<bf16> = (0..64 * 80)
        .map(|i| bf16::from_f32((i % 7) as f32))
        .collect();
    let (a, b) = values.split_at(64 * 64);
    for (name, what) in [
        ("wgmma_registers_no_fence", "without a `wgmma.fence` since"),
        ("wgmma_no_wait", "a register that is not waited for"),
    ] {
        let fault = product(name, a, b, 0).expect_err(name);
        println!("{fault}\n");
        assert!(matches!(*fault.kind, FaultKind::Undefined(_)), "{fault}");
        assert!(fault.to_string().contains(what), "{fault}");
    }
    for name in ["wgmma_registers", "wgmma_shared"] {
        product(name, a, b, 0).unwrap_or_else(|fault| panic!("{fault}"));
    }
    // Before the first product, too.
    let (before, after) = HOPPER.split_at(HOPPER.find(".entry wgmma_shared(").unwrap());
    let ptx = format!(
        "{before}{}",
        after.replacen("wgmma.fence.sync.aligned;", "", 1)
    );
    let fault = product_of(&ptx, "wgmma_shared", a, b, 0).expect_err("no fence");
    assert!(
        fault.to_string().contains("without a `wgmma.fence`"),
        "{fault}"
    );
}

#[test]
fn what_is_forgotten_about_wgmma_shows() {
    let values: Vec<bf16> = (0..64 * 80)
        .map(|i| bf16::from_f32((i % 7) as f32))
        .collect();
    let (a, b) = values.split_at(64 * 64);
    let right = product("wgmma_shared", a, b, 0).expect("no fault");
    assert!(shows(product("wgmma_no_wait", a, b, 0), &right));
}

#[test]
fn blocks_of_a_cluster_read_each_other() {
    for seed in 0..4 {
        let gpu = hopper();
        let kernel = kernel(&gpu, HOPPER, "cluster_exchange");
        let out = upload(&gpu, &[0u32; 256]);
        let args = args![kernel, out.0];
        launch(&gpu, &kernel, 4, 64, seed, &args).unwrap_or_else(|f| panic!("{f}"));
        let expected: Vec<u32> = (0..256).map(|i| 1000 * ((i / 64) ^ 1) + i % 64).collect();
        assert_eq!(download::<u32>(&gpu, out, 256), expected);
    }
}

#[test]
fn stores_and_atomics_reach_the_other_block() {
    let gpu = hopper();
    let kernel = kernel(&gpu, HOPPER, "cluster_scatter");
    let out = upload(&gpu, &[0u32; 128]);
    let args = args![kernel, out.0];
    launch(&gpu, &kernel, 2, 64, 1, &args).unwrap_or_else(|f| panic!("{f}"));
    let expected: Vec<u32> = (0..128)
        .map(|i| 640_000 + 100 * ((i / 64) ^ 1) + i % 64)
        .collect();
    assert_eq!(download::<u32>(&gpu, out, 128), expected);
}

#[test]
fn a_block_that_has_ended_has_no_shared_memory() {
    let gpu = hopper();
    let kernel = kernel(&gpu, HOPPER, "cluster_no_last_wait");
    let out = upload(&gpu, &[0u32; 64]);
    let args = args![kernel, out.0];
    // Block 0 takes the first turn and waits; block 1 completes the barrier and ends.
    let fault = launch(&gpu, &kernel, 2, 64, 0, &args).expect_err("a read of an ended block");
    assert!(fault.to_string().contains("has ended"), "{fault}");
}

#[test]
fn a_remote_arrival_releases_the_other_block() {
    let gpu = hopper();
    let kernel = kernel(&gpu, HOPPER, "cluster_arrive");
    let out = upload(&gpu, &[0u32; 2]);
    let args = args![kernel, out.0];
    launch(&gpu, &kernel, 2, 32, 0, &args).unwrap_or_else(|f| panic!("{f}"));
    assert_eq!(download::<u32>(&gpu, out, 2), [8, 7]);
}

#[test]
fn multicast_fills_every_block_of_the_mask() {
    let gpu = hopper();
    let kernel = kernel(&gpu, HOPPER, "cluster_multicast");
    let source: Vec<u16> = (0..8 * 64).collect();
    let (from, out) = (upload(&gpu, &source), upload(&gpu, &[0u32; 512]));
    let map = TensorMap {
        swizzle: Swizzle::None,
        ..map_of(from, 8, 64, 4)
    }
    .encode();
    let args = arguments(&kernel, &[&map, &out.0.to_le_bytes()]);
    launch(&gpu, &kernel, 2, 256, 0, &args).unwrap_or_else(|f| panic!("{f}"));
    let words: Vec<u32> = source
        .chunks_exact(2)
        .map(|p| u32::from(p[0]) | u32::from(p[1]) << 16)
        .collect();
    assert_eq!(
        download::<u32>(&gpu, out, 512),
        [&words[..], &words[..]].concat()
    );
}

const MATMUL: &str = include_str!("ptx/hopper_matmul.ptx");

/// `A [m, k] * B [n, k]` transposed by a kernel of `hopper_matmul.cu`.
fn matmul(
    name: &str,
    [m, n, k]: [usize; 3],
    a: &[bf16],
    b: &[bf16],
    seed: u64,
) -> Result<Vec<f32>, Fault> {
    let gpu = hopper();
    let kernel = kernel(&gpu, MATMUL, name);
    let bits = |x: &[bf16]| x.iter().map(|x| x.to_bits()).collect::<Vec<u16>>();
    let (da, db, c) = (
        upload(&gpu, &bits(a)),
        upload(&gpu, &bits(b)),
        upload(&gpu, &vec![0f32; m * n]),
    );
    let maps = [
        map_of(da, m as u64, k as u64, 128),
        map_of(db, n as u64, k as u64, 64),
    ];
    let [a_map, b_map] = maps.map(|map| map.encode());
    let (n_bytes, k_bytes) = ((n as i32).to_le_bytes(), (k as i32).to_le_bytes());
    let args = arguments(
        &kernel,
        &[&a_map, &b_map, &c.0.to_le_bytes(), &n_bytes, &k_bytes],
    );
    let config = LaunchConfig {
        grid: [n as u32 / 64, m as u32 / 128, 1],
        block: [384, 1, 1],
        shared_bytes: 3 * (128 + 64) * 64 * 2 + 1024,
        seed,
        ..LaunchConfig::default()
    };
    gpu.launch(&kernel, &config, &args)?;
    Ok(download(&gpu, c, m * n))
}

fn values(count: usize, salt: usize) -> Vec<bf16> {
    (0..count)
        .map(|i| bf16::from_f32(((i * 7919 + salt) % 251) as f32 / 64.0 - 2.0))
        .collect()
}

#[test]
fn a_hopper_matmul_is_right_for_every_seed() {
    let shape @ [m, n, k] = [256, 128, 448];
    let (a, b) = (values(m * k, 1), values(n * k, 2));
    let c = matmul("hopper_matmul", shape, &a, &b, 0).unwrap_or_else(|f| panic!("{f}"));
    for (i, got) in c.iter().enumerate() {
        let (row, column) = (i / n, i % n);
        let terms = (0..k).map(|j| a[row * k + j].to_f64() * b[column * k + j].to_f64());
        let (exact, size) = terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
        let bound = k as f64 * size * 2f64.powi(-24);
        assert!(
            (f64::from(*got) - exact).abs() <= bound,
            "{row}, {column}: {got} {exact}"
        );
    }
    for seed in 1..4 {
        assert_eq!(
            matmul("hopper_matmul", shape, &a, &b, seed).expect("no fault"),
            c
        );
    }
}

#[test]
fn what_is_forgotten_in_a_hopper_matmul_shows() {
    let shape @ [m, n, k] = [128, 64, 448];
    let (a, b) = (values(m * k, 1), values(n * k, 2));
    let right = matmul("hopper_matmul", shape, &a, &b, 0).expect("no fault");
    for defect in ["early_release", "no_empty_wait", "wrong_parity"] {
        let outcome = matmul(&format!("hopper_matmul_{defect}"), shape, &a, &b, 0);
        assert!(shows(outcome, &right), "{defect}");
    }
}
