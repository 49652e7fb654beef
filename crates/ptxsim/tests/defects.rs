//! One defect of each kind, planted in a copy of the tensor-core matmul by editing its PTX: each is
//! reported or changes the result. The original is silent.

mod support;

use ptxsim::{Checks, FaultKind, LaunchConfig};
use support::*;

const SIZE: usize = 128;

/// Runs the matmul's PTX on fixed inputs: the result, or the fault.
fn run(ptx: &str, checks: Checks, seed: u64) -> Result<Vec<f32>, ptxsim::Fault> {
    let gpu = gpu();
    let kernel = kernel(&gpu, ptx, "matmul");
    let values = |salt: usize| -> Vec<u16> {
        let value = |i: usize| ((i * 7 + salt) % 31) as f32 / 16.0 - 1.0;
        (0..SIZE * SIZE)
            .map(|i| half::bf16::from_f32(value(i)).to_bits())
            .collect()
    };
    let (a, b) = (upload(&gpu, &values(3)), upload(&gpu, &values(11)));
    let c = gpu.alloc((SIZE * SIZE * 4) as u64).unwrap();
    let config = LaunchConfig {
        grid: [SIZE as u32 / 64, SIZE as u32 / 64, 1],
        block: [128, 1, 1],
        checks,
        seed,
        ..LaunchConfig::default()
    };
    let size = SIZE as i32;
    gpu.launch(
        &kernel,
        &config,
        &args![kernel, size, size, size, a.0, b.0, c.0],
    )?;
    Ok(download(&gpu, c, SIZE * SIZE))
}

/// The report of what is wrong with it, printed too: the README quotes some.
fn fault(ptx: &str, checks: Checks, seed: u64) -> ptxsim::Fault {
    let fault = run(ptx, checks, seed).unwrap_err();
    println!("{fault}\n");
    fault
}

/// The matmul with its `nth` line that contains `pattern` changed by `edit`.
fn planted(pattern: &str, nth: usize, edit: impl Fn(&str) -> String) -> String {
    let mut seen = 0;
    let mut edited = false;
    let lines = MATMUL.lines().map(|line| {
        if line.contains(pattern) {
            seen += 1;
            if seen == nth + 1 {
                edited = true;
                return edit(line);
            }
        }
        line.to_string()
    });
    let text = lines.collect::<Vec<String>>().join("\n");
    assert!(edited, "the matmul has no line {nth} with `{pattern}`");
    text
}

fn good() -> Vec<f32> {
    run(MATMUL, Checks::none(), 0).unwrap()
}

#[test]
fn the_original_is_silent_under_every_seed() {
    let good = good();
    for seed in 0..6 {
        let result = run(MATMUL, Checks::all(), seed).unwrap_or_else(|fault| panic!("{fault}"));
        assert_eq!(result, good);
    }
}

#[test]
fn a_missing_barrier_is_a_race() {
    let ptx = planted("bar.sync", 0, |_| String::new());
    // With every check on, reading what no warp has copied yet is reported even before.
    fault(&ptx, Checks::all(), 1);
    let checks = Checks {
        shared_races: true,
        ..Checks::none()
    };
    let fault = fault(&ptx, checks, 1);
    assert!(matches!(&*fault.kind, FaultKind::Race { .. }), "{fault}");
}

#[test]
fn an_uninitialized_accumulator_changes_the_result() {
    let ptx = planted("0f00000000;", 0, |_| String::new());
    assert_ne!(run(&ptx, Checks::all(), 0).unwrap(), good());
}

#[test]
fn a_missing_wait_is_reported_and_changes_the_result() {
    let ptx = planted("cp.async.wait_group", 0, |_| String::new());
    let fault = fault(&ptx, Checks::all(), 0);
    assert!(
        matches!(&*fault.kind, FaultKind::BeforeWait { .. }),
        "{fault}"
    );
    assert_ne!(run(&ptx, Checks::none(), 0).unwrap(), good());
}

#[test]
fn a_wait_that_leaves_one_group_too_many_is_reported() {
    let ptx = planted("cp.async.wait_group", 0, |line| {
        line.replace("wait_group 1", "wait_group 2")
    });
    let fault = fault(&ptx, Checks::all(), 0);
    assert!(
        matches!(&*fault.kind, FaultKind::BeforeWait { .. }),
        "{fault}"
    );
}

#[test]
fn an_offset_that_is_too_large_is_out_of_bounds() {
    let ptx = planted("st.global.v2", 0, |line| {
        line.replace(']', &format!("+{}]", SIZE * SIZE * 4 - SIZE * 2))
    });
    let fault = fault(&ptx, Checks::all(), 0);
    assert!(
        matches!(&*fault.kind, FaultKind::OutOfBounds { .. }),
        "{fault}"
    );
}

#[test]
fn swapped_fragment_registers_change_the_result() {
    let swap = |line: &str| {
        let (open, close) = (line.find('{').unwrap(), line.find('}').unwrap());
        let mut parts: Vec<&str> = line[open + 1..close].split(',').collect();
        parts.swap(1, 2);
        format!("{}{}{}", &line[..open + 1], parts.join(","), &line[close..])
    };
    let ptx = planted("ldmatrix.sync.aligned.m8n8.x4", 0, swap);
    assert_ne!(run(&ptx, Checks::all(), 0).unwrap(), good());
}

#[test]
fn a_matrix_instruction_in_half_a_warp_is_reported() {
    let guard = "{ .reg .pred half; .reg .u32 lane; mov.u32 lane, %laneid;
        setp.lt.u32 half, lane, 16; @half ";
    let ptx = planted("mma.sync", 0, |line| format!("{guard}{line} }}"));
    let fault = fault(&ptx, Checks::all(), 0);
    assert!(
        matches!(&*fault.kind, FaultKind::MissingLanes { .. }),
        "{fault}"
    );
}
