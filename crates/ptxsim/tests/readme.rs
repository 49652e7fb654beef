//! The README's reports are what its kernels cause today. Blocks run one after the other here, so
//! that every report names the same threads each time.

mod support;

use ptxsim::{Checks, DevicePtr, Fault, LaunchConfig, Profile};
use support::*;

const README: &str = include_str!("../README.md");
const HOPPER: &str = include_str!("ptx/hopper.ptx");

/// Runs `act` with one thread for all blocks.
fn alone<T: Send>(act: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1);
    pool.build().unwrap().install(act)
}

/// The fault of the matmul with one line changed.
fn matmul(pattern: &str, checks: Checks, seed: u64, edit: impl Fn(&str) -> String) -> Fault {
    let ptx = planted(pattern, 0, edit);
    alone(|| run_matmul(&ptx, checks, seed)).unwrap_err()
}

/// The fault of a small kernel on 256 words that `prepare` may spoil.
fn small_on(body: &str, grid: u32, prepare: impl Fn(&ptxsim::Gpu, DevicePtr)) -> Fault {
    let gpu = gpu();
    let data = upload(&gpu, &[1u32; 256]);
    let kernel = kernel(&gpu, &small_kernel(body), "k");
    prepare(&gpu, data);
    let config = LaunchConfig {
        grid: [grid, 1, 1],
        block: [64, 1, 1],
        ..LaunchConfig::default()
    };
    alone(|| gpu.launch(&kernel, &config, &data.0.to_le_bytes())).unwrap_err()
}

fn small(body: &str) -> Fault {
    small_on(body, 1, |_, _| {})
}

/// `saxpy` on the host's memory.
fn host_pointer() -> Fault {
    let gpu = gpu();
    let kernel = kernel(&gpu, BASICS, "saxpy");
    let host = 0x8000_0000_0000u64;
    let config = LaunchConfig::default();
    let args = args![kernel, 1i32, 1.0f32, host, host];
    gpu.launch(&kernel, &config, &args).unwrap_err()
}

fn missing_proxy_fence() -> Fault {
    let gpu = ptxsim::Gpu::new(Profile::h100());
    let kernel = kernel(&gpu, HOPPER, "bulk_copy_no_fence");
    let data = upload(&gpu, &[1f32; 256]);
    let config = LaunchConfig {
        block: [256, 1, 1],
        ..LaunchConfig::default()
    };
    let args = args![kernel, data.0, data.0];
    gpu.launch(&kernel, &config, &args).unwrap_err()
}

#[test]
fn the_reports_are_up_to_date() {
    let nothing = |_: &str| String::new();
    let races = Checks {
        shared_races: true,
        ..Checks::none()
    };
    let faults = [
        matmul("st.global.v2", Checks::all(), 0, |line| {
            let past = MATMUL_SIZE * MATMUL_SIZE * 4 - MATMUL_SIZE * 2;
            line.replace(']', &format!("+{past}]"))
        }),
        small("ld.global.v2.u32 {%r5, %r6}, [%rd1+4];"),
        small_on("ld.global.u32 %r5, [%rd2];", 1, |gpu, data| {
            gpu.free(data).unwrap();
        }),
        host_pointer(),
        matmul("bar.sync", Checks::all(), 1, nothing),
        matmul("bar.sync", races, 1, nothing),
        small_on("st.global.u32 [%rd2], %r4;", 4, |_, _| {}),
        small("setp.lt.u32 %p1, %r1, 40; @%p1 bra skip; bar.sync 0; skip:"),
        small("setp.lt.u32 %p1, %r1, 32; @%p1 exit; bar.sync 0;"),
        small(
            "setp.ge.u32 %p1, %r1, 16; @%p1 bra skip;
             shfl.sync.bfly.b32 %r5, %r1, 1, 31, 0xffffffff; skip:",
        ),
        small("shfl.sync.bfly.b32 %r5, %r1, 1, 31, 0xffff;"),
        matmul("cp.async.wait_group", Checks::all(), 0, nothing),
        missing_proxy_fence(),
    ];
    let reports: Vec<String> = faults.iter().map(Fault::to_string).collect();
    for report in &reports {
        assert!(README.contains(report), "the README lacks:\n{report}");
    }
    // And it shows no other.
    let shown = README.matches("\nkernel `").count();
    assert_eq!(shown, reports.len(), "{reports:#?}");
}
