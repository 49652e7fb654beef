//! One defect of each kind, planted in a copy of the tensor-core matmul by editing its PTX: each is
//! reported or changes the result. The original is silent.

mod support;

use ptxsim::{Checks, FaultKind};
use support::*;

/// The report of what is wrong with it, printed too: the README quotes some.
fn fault(ptx: &str, checks: Checks, seed: u64) -> ptxsim::Fault {
    let fault = run_matmul(ptx, checks, seed).unwrap_err();
    println!("{fault}\n");
    fault
}

fn good() -> Vec<f32> {
    run_matmul(MATMUL, Checks::none(), 0).unwrap()
}

#[test]
fn the_original_is_silent_under_every_seed() {
    let good = good();
    for seed in 0..6 {
        let result =
            run_matmul(MATMUL, Checks::all(), seed).unwrap_or_else(|fault| panic!("{fault}"));
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
    assert_ne!(run_matmul(&ptx, Checks::all(), 0).unwrap(), good());
}

#[test]
fn a_missing_wait_is_reported_and_changes_the_result() {
    let ptx = planted("cp.async.wait_group", 0, |_| String::new());
    let fault = fault(&ptx, Checks::all(), 0);
    assert!(
        matches!(&*fault.kind, FaultKind::BeforeWait { .. }),
        "{fault}"
    );
    assert_ne!(run_matmul(&ptx, Checks::none(), 0).unwrap(), good());
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
        line.replace(
            ']',
            &format!("+{}]", MATMUL_SIZE * MATMUL_SIZE * 4 - MATMUL_SIZE * 2),
        )
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
    assert_ne!(run_matmul(&ptx, Checks::all(), 0).unwrap(), good());
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
