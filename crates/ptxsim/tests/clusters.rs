//! The checks inside clusters of two blocks: for each a kernel with the defect and an innocent twin,
//! under every seed.

mod support;

use ptxsim::{Fault, FaultKind, Gpu, LaunchConfig, LaunchReport, Profile};
use support::*;

/// A kernel with the thread in `%r1`, the own rank in `%r4` and the other one in `%r5`; 256 bytes of
/// shared memory, whose word for the thread is at `%r2` here and at `%r6` in the other block; an
/// mbarrier at `%r7` here and at `%r8` there.
fn ptx(body: &str) -> String {
    format!(
        ".version 8.0
        .target sm_90
        .address_size 64
        .visible .entry k(.param .u64 data)
        {{
            .reg .pred %p<8>;
            .reg .b32 %r<32>;
            .reg .b64 %rd<8>;
            .shared .align 16 .b8 tile[256];
            .shared .align 8 .b64 ready;
            ld.param.u64 %rd1, [data];
            mov.u32 %r1, %tid.x;
            mov.u32 %r2, tile;
            shl.b32 %r3, %r1, 2;
            add.s32 %r2, %r2, %r3;
            mov.u32 %r4, %cluster_ctarank;
            xor.b32 %r5, %r4, 1;
            mapa.shared::cluster.u32 %r6, %r2, %r5;
            mov.u32 %r7, ready;
            mapa.shared::cluster.u32 %r8, %r7, %r5;
            {body}
            ret;
        }}"
    )
}

const SYNC: &str = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;";

fn run(body: &str, seed: u64) -> Result<LaunchReport, Fault> {
    let gpu = Gpu::new(Profile::h100());
    let kernel = kernel(&gpu, &ptx(body), "k");
    let data = upload(&gpu, &[1u32; 256]);
    let config = LaunchConfig {
        grid: [4, 1, 1],
        block: [64, 1, 1],
        cluster: [2, 1, 1],
        seed,
        ..LaunchConfig::default()
    };
    gpu.launch(&kernel, &config, &data.0.to_le_bytes())
}

fn fault(body: &str) -> Fault {
    match run(body, 0) {
        Ok(_) => panic!("no fault in: {body}"),
        Err(fault) => {
            println!("{fault}\n");
            fault
        }
    }
}

fn innocent(body: &str) {
    for seed in 0..8 {
        run(body, seed).unwrap_or_else(|fault| panic!("{fault}\n{body}"));
    }
}

/// A race, with its parties in different blocks.
fn race_between_blocks(body: &str) {
    let fault = fault(body);
    let FaultKind::Race { other, .. } = &*fault.kind else {
        panic!("{fault}");
    };
    let party = fault.party.as_ref().unwrap();
    assert_ne!(party.block, other.block, "{fault}");
    assert_eq!(party.thread[0], other.thread[0], "{fault}");
}

#[test]
fn a_remote_read_needs_the_clusters_barrier() {
    let body = |sync: &str| {
        format!(
            "st.shared.u32 [%r2], %r1; {SYNC} ld.shared::cluster.u32 %r9, [%r6];
             {sync} st.shared.u32 [%r2], %r9; {SYNC}"
        )
    };
    race_between_blocks(&body(""));
    race_between_blocks(&body("bar.sync 0;"));
    innocent(&body(SYNC));
}

#[test]
fn a_remote_write_needs_the_clusters_barrier() {
    let body = |sync: &str| {
        format!(
            "st.shared.u32 [%r2], 0; {SYNC} st.shared::cluster.u32 [%r6], %r1;
             {sync} ld.shared.u32 %r9, [%r2]; {SYNC}"
        )
    };
    race_between_blocks(&body(""));
    innocent(&body(SYNC));
    // Blocks that only meet themselves have not met each other.
    race_between_blocks(&body("bar.sync 0;"));
    // Atomics do not race with each other.
    innocent(&format!(
        "st.shared.u32 [%r2], 0; {SYNC} red.shared::cluster.add.u32 [%r6], 1;
         red.shared.add.u32 [%r2], 1; {SYNC}"
    ));
}

#[test]
fn one_block_still_races_with_itself() {
    let body = |sync: &str| {
        format!(
            "st.shared.u32 [%r2], %r1; {sync} xor.b32 %r9, %r2, 128; st.shared.u32 [%r9], 0; {SYNC}"
        )
    };
    let fault = fault(&body(""));
    assert!(matches!(&*fault.kind, FaultKind::Race { .. }), "{fault}");
    innocent(&body("bar.sync 0;"));
}

#[test]
fn a_remote_arrival_orders_what_came_before_it() {
    // Each thread writes into the other block and arrives there; who waits may read.
    let body = |wait: &str| {
        format!(
            "setp.ne.u32 %p1, %r1, 0; @%p1 bra begun; mbarrier.init.shared.b64 [%r7], 64; begun:
             st.shared.u32 [%r2], 0; {SYNC}
             st.shared::cluster.u32 [%r6], %r1;
             mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r8];
             {wait}
             ld.shared.u32 %r9, [%r2]; {SYNC}"
        )
    };
    race_between_blocks(&body(""));
    innocent(&body(
        "wait: mbarrier.try_wait.parity.shared.b64 %p2, [%r7], 0; @!%p2 bra wait;",
    ));
}

#[test]
fn uninitialized_shared_memory_of_a_cluster() {
    let local = fault(&format!("ld.shared.u32 %r9, [%r2]; {SYNC}"));
    let remote = fault(&format!("{SYNC} ld.shared::cluster.u32 %r9, [%r6]; {SYNC}"));
    // Only block 0 of the cluster writes its own memory: the other one's is read in vain.
    let half = fault(&format!(
        "setp.ne.u32 %p1, %r4, 0; @%p1 bra skip; st.shared.u32 [%r2], 1; skip: {SYNC}
         ld.shared::cluster.u32 %r9, [%r6]; {SYNC}"
    ));
    for fault in [&local, &remote, &half] {
        assert!(
            matches!(&*fault.kind, FaultKind::Uninitialized { .. }),
            "{fault}"
        );
    }
    assert_eq!(half.party.unwrap().block[0] % 2, 0);
    // What the other block wrote here is written.
    innocent(&format!(
        "st.shared::cluster.u32 [%r6], %r1; {SYNC} ld.shared.u32 %r9, [%r2];
         ld.shared::cluster.u32 %r9, [%r6]; {SYNC}"
    ));
}
