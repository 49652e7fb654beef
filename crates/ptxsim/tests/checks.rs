//! For each check a kernel with the defect, which it finds, and an innocent twin, which it leaves
//! alone, under every seed.

mod support;

use ptxsim::{AccessKind, Checks, Fault, FaultKind, Gpu, LaunchConfig, LaunchReport, Profile};
use support::*;

struct Case {
    gpu: Gpu,
    config: LaunchConfig,
    data: ptxsim::DevicePtr,
}

/// 256 written words of data, one block of 64 threads.
fn case() -> Case {
    let gpu = gpu();
    let data = upload(&gpu, &[1u32; 256]);
    let config = LaunchConfig {
        block: [64, 1, 1],
        ..LaunchConfig::default()
    };
    Case { gpu, config, data }
}

impl Case {
    fn run(&self, body: &str) -> Result<LaunchReport, Fault> {
        let kernel = kernel(&self.gpu, &small_kernel(body), "k");
        self.gpu
            .launch(&kernel, &self.config, &self.data.0.to_le_bytes())
    }

    fn fault(&self, body: &str) -> Fault {
        match self.run(body) {
            Ok(_) => panic!("no fault in: {body}"),
            Err(fault) => {
                println!("{fault}\n");
                fault
            }
        }
    }

    fn innocent(&mut self, body: &str) {
        for seed in 0..8 {
            self.config.seed = seed;
            self.run(body).unwrap_or_else(|fault| panic!("{fault}"));
        }
    }
}

#[test]
fn out_of_bounds() {
    let mut case = case();
    let fault = case.fault("ld.global.u32 %r5, [%rd2+772];");
    let FaultKind::OutOfBounds {
        access,
        nearest: Some(nearest),
        ..
    } = &*fault.kind
    else {
        panic!("{fault}");
    };
    assert_eq!((access.address, access.bytes), (case.data.0 + 1024, 4));
    assert_eq!((nearest.address, nearest.bytes), (case.data.0, 1024));
    assert_eq!(fault.party.as_ref().unwrap().thread, [63, 0, 0]);
    assert!(
        fault
            .to_string()
            .contains("0 bytes past the end of the 1024 bytes"),
        "{fault}"
    );
    let fault = case.fault("ld.global.u32 %r5, [%rd2+-4];");
    assert!(
        fault.to_string().contains("4 bytes before the 1024 bytes"),
        "{fault}"
    );
    case.innocent("ld.global.u32 %r5, [%rd2+768];");
    let fault = case.fault("st.shared.u32 [%r2+772], %r1;");
    assert!(matches!(
        &*fault.kind,
        FaultKind::OutOfBounds {
            limit: Some(1024),
            ..
        }
    ));
    case.innocent("st.shared.u32 [%r2+768], %r1;");
}

#[test]
fn misaligned() {
    let mut case = case();
    let fault = case.fault("ld.global.v2.u32 {%r5, %r6}, [%rd1+4];");
    assert!(matches!(
        &*fault.kind,
        FaultKind::Misaligned { alignment: 8, .. }
    ));
    case.innocent("ld.global.v2.u32 {%r5, %r6}, [%rd1+8];");
}

#[test]
fn use_after_free_and_host_pointers() {
    let mut case = case();
    case.innocent("ld.global.u32 %r5, [%rd2];");
    case.gpu.free(case.data).unwrap();
    let fault = case.fault("ld.global.u32 %r5, [%rd2];");
    assert!(matches!(&*fault.kind, FaultKind::UseAfterFree { allocation, .. } if allocation.freed));
    let host = [0u32; 64];
    let kernel = kernel(&case.gpu, &small_kernel("ld.global.u32 %r5, [%rd2];"), "k");
    let args = (host.as_ptr() as u64).to_le_bytes();
    let fault = case.gpu.launch(&kernel, &case.config, &args).unwrap_err();
    assert!(
        matches!(&*fault.kind, FaultKind::HostPointer { .. }),
        "{fault}"
    );
}

#[test]
fn uninitialized_global_memory() {
    let mut case = case();
    case.data = case.gpu.alloc(256).unwrap();
    let fault = case.fault("ld.global.u32 %r5, [%rd2];");
    assert!(matches!(
        &*fault.kind,
        FaultKind::Uninitialized {
            allocation: Some(_),
            ..
        }
    ));
    // One byte short.
    case.gpu.fill8(case.data, 0, 255).unwrap();
    let fault = case.fault("ld.global.u32 %r5, [%rd2];");
    assert_eq!(fault.party.unwrap().thread, [63, 0, 0]);
    case.innocent("st.global.u32 [%rd2], %r1; ld.global.u32 %r5, [%rd2];");
}

#[test]
fn uninitialized_shared_and_local_memory() {
    let mut case = case();
    let fault = case.fault("ld.shared.u32 %r5, [%r2];");
    assert!(matches!(
        &*fault.kind,
        FaultKind::Uninitialized {
            allocation: None,
            ..
        }
    ));
    case.innocent("st.shared.u32 [%r2], %r1; ld.shared.u32 %r5, [%r2];");
    let local = ".local .align 4 .b8 depot[16]; mov.u64 %rd3, depot; cvta.local.u64 %rd4, %rd3;";
    let fault = case.fault(&format!(
        "{local} st.u32 [%rd4], %r1; ld.u32 %r5, [%rd4+4];"
    ));
    assert!(matches!(&*fault.kind, FaultKind::Uninitialized { .. }));
    case.innocent(&format!(
        "{local} st.u32 [%rd4+4], %r1; ld.u32 %r5, [%rd4+4];"
    ));
}

const NEIGHBOUR: &str = "xor.b32 %r6, %r2, 128; ld.shared.u32 %r5, [%r6];";

#[test]
fn shared_race_between_warps() {
    let mut case = case();
    case.config.checks.uninitialized = false;
    let fault = case.fault(&format!("st.shared.u32 [%r2], %r1; {NEIGHBOUR}"));
    let FaultKind::Race {
        other_kind, other, ..
    } = &*fault.kind
    else {
        panic!("{fault}")
    };
    let party = fault.party.as_ref().unwrap();
    assert_ne!(party.thread[0] / 32, other.thread[0] / 32);
    assert_ne!(party.location.ptx_line, 0);
    assert!(matches!(other_kind, AccessKind::Write | AccessKind::Read));
    let safe = format!("st.shared.u32 [%r2], %r1; bar.sync 0; {NEIGHBOUR}");
    case.innocent(&safe);
    // Writing again after the reads needs a second barrier.
    case.fault(&format!("{safe} st.shared.u32 [%r2], %r5;"));
    case.innocent(&format!("{safe} bar.sync 0; st.shared.u32 [%r2], %r5;"));
}

#[test]
fn shared_race_between_halves_of_a_word() {
    // Warps write different bytes of the same word.
    let mut case = case();
    case.innocent(
        "shr.u32 %r5, %r1, 5; mov.u32 %r6, tile; add.u32 %r6, %r6, %r5;
         mov.u16 %rs1, 7; st.shared.u8 [%r6], %rs1;",
    );
    let atomic = "mov.u32 %r6, tile; st.shared.u32 [%r6], 0;";
    case.config.block = [32, 1, 1];
    case.innocent(&format!("{atomic} atom.shared.add.u32 %r5, [%r6], 1;"));
    case.config.block = [64, 1, 1];
    case.innocent(
        &format!(
            "setp.ne.u32 %p1, %r1, 0; @%p1 bra go; {atomic} go: bar.sync 0;
         atom.shared.add.u32 %r5, [%r6], 1;"
        )
        .replace(
            "atom.shared.add.u32 %r5, [%r6]",
            "mov.u32 %r6, tile; atom.shared.add.u32 %r5, [%r6]",
        ),
    );
}

#[test]
fn shared_race_between_diverged_lanes() {
    let mut case = case();
    case.config.block = [32, 1, 1];
    // Lanes below 16 write; the others, on the other side of the branch, read what they write.
    let body = |sync: &str| {
        format!(
            "st.shared.u32 [%r2], %r1; bar.warp.sync -1;
             mov.u32 %r7, tile; setp.lt.u32 %p1, %r1, 16; @%p1 bra low;
             {sync} xor.b32 %r6, %r2, 64; ld.shared.u32 %r5, [%r6]; bra done;
             low: st.shared.u32 [%r2], %r3; {sync}
             done:"
        )
    };
    let fault = case.fault(&body(""));
    assert!(matches!(&*fault.kind, FaultKind::Race { .. }), "{fault}");
    case.innocent(&body("bar.warp.sync -1;"));
}

#[test]
fn named_barriers_order_producer_and_consumer() {
    let mut case = case();
    let body = |wait: &str| {
        format!(
            "setp.lt.u32 %p1, %r1, 32; @%p1 bra produce;
             {wait} xor.b32 %r6, %r2, 128; ld.shared.u32 %r5, [%r6]; bra done;
             produce: st.shared.u32 [%r2], %r1; bar.arrive 3, 64;
             done:"
        )
    };
    case.innocent(&body("bar.sync 3, 64;"));
    case.config.checks = Checks {
        shared_races: true,
        ..Checks::none()
    };
    assert!(matches!(
        &*case.fault(&body("")).kind,
        FaultKind::Race { .. }
    ));
}

#[test]
fn global_race_between_blocks() {
    let mut case = case();
    case.config.grid = [4, 1, 1];
    let fault = case.fault("st.global.u32 [%rd2], %r4;");
    let FaultKind::Race {
        other,
        allocation: Some(_),
        ..
    } = &*fault.kind
    else {
        panic!("{fault}");
    };
    assert_ne!(other.block, fault.party.as_ref().unwrap().block);
    case.innocent(
        "shl.b32 %r5, %r4, 8; cvt.u64.u32 %rd3, %r5; add.s64 %rd2, %rd2, %rd3;
                   st.global.u32 [%rd2], %r4;",
    );
    case.innocent("red.global.add.u32 [%rd2], 1;");
    case.innocent("ld.global.u32 %r5, [%rd2];");
    // Blocks write neighbouring halves of the same words.
    case.config.grid = [2, 1, 1];
    case.innocent(
        "shl.b32 %r5, %r4, 1; cvt.u64.u32 %rd3, %r5; add.s64 %rd2, %rd2, %rd3;
                   ld.global.u16 %rs1, [%rd2]; st.global.u16 [%rd2], %rs1;",
    );
}

/// Both parties of a race in global memory, as block and thread.
fn parties(fault: &Fault) -> [([u32; 3], [u32; 3]); 2] {
    let FaultKind::Race { other, .. } = &*fault.kind else {
        panic!("{fault}");
    };
    let party = fault.party.as_ref().unwrap();
    [(other.block, other.thread), (party.block, party.thread)]
}

#[test]
fn a_global_race_names_both_threads() {
    let mut case = case();
    case.config.grid = [2, 1, 1];
    // Thread 37 of the first block reads; thread 5 of the second writes. Either block may come first.
    let body = "setp.eq.u32 %p1, %r1, 37; setp.eq.u32 %p2, %r4, 0; and.pred %p1, %p1, %p2;
                @%p1 ld.global.u32 %r5, [%rd1];
                setp.eq.u32 %p2, %r1, 5; setp.eq.u32 %p3, %r4, 1; and.pred %p2, %p2, %p3;
                @%p2 st.global.u32 [%rd1], %r1;";
    let mut parties = parties(&case.fault(body));
    parties.sort();
    assert_eq!(parties, [([0, 0, 0], [37, 0, 0]), ([1, 0, 0], [5, 0, 0])]);
}

#[test]
fn global_race_within_a_block() {
    let mut case = case();
    let neighbour = "xor.b32 %r6, %r1, 32; mul.wide.u32 %rd3, %r6, 4; add.s64 %rd3, %rd1, %rd3;";
    let body = |sync: &str| {
        format!("st.global.u32 [%rd2], %r1; {neighbour} {sync} ld.global.u32 %r5, [%rd3];")
    };
    let fault = case.fault(&body(""));
    let [(_, earlier), (_, later)] = parties(&fault);
    assert_eq!((earlier, later), ([0, 0, 0], [32, 0, 0]));
    case.innocent(&body("bar.sync 0;"));
    assert!(fault.to_string().contains("against the read"), "{fault}");
    // The other warp reads what was written before.
    let body = |sync: &str| {
        format!("{neighbour} ld.global.u32 %r5, [%rd3]; {sync} st.global.u32 [%rd2], %r1;")
    };
    let fault = case.fault(&body(""));
    assert!(fault.to_string().contains("against the write"), "{fault}");
    case.innocent(&body("bar.sync 0;"));
    // Both warps add to the same words.
    case.innocent("red.global.add.u32 [%rd1], 1; bar.sync 0; ld.global.u32 %r5, [%rd1];");
}

/// Halves of one word: what a warp read before the barrier is not what it reads after it.
#[test]
fn neighbours_in_a_word_do_not_race() {
    let mut case = case();
    // After the barrier warp 0 reads one half while warp 1 writes the other, which warp 0 read before.
    let body = "setp.lt.u32 %p1, %r1, 32; @%p1 ld.global.u16 %rs1, [%rd1+2]; bar.sync 0;
                @%p1 ld.global.u16 %rs1, [%rd1];
                setp.eq.u32 %p2, %r1, 40; @%p2 st.global.u16 [%rd1+2], %rs1;";
    case.innocent(body);
    case.fault(&body.replace("bar.sync 0;", ""));
}

#[test]
fn a_flag_orders_the_warps_of_a_block() {
    // Warp 0 writes and raises a flag in shared memory; warp 1 waits for the flag and reads.
    let body = |fence: &str| {
        format!(
            "mov.u32 %r7, tile; setp.eq.u32 %p2, %r1, 0; @%p2 st.volatile.shared.u32 [%r7], 0; bar.sync 0;
             setp.ge.u32 %p1, %r1, 32; @%p1 bra consume;
             st.global.u32 [%rd2], %r1; bar.warp.sync -1; {fence}
             @%p2 st.volatile.shared.u32 [%r7], 1; bra done;
             consume: ld.volatile.shared.u32 %r8, [%r7]; setp.eq.u32 %p3, %r8, 0; @%p3 bra consume;
             {fence} ld.global.u32 %r5, [%rd2+-128];
             done:"
        )
    };
    let mut case = case();
    case.innocent(&body("membar.cta;"));
    let fault = case.fault(&body(""));
    assert!(matches!(&*fault.kind, FaultKind::Race { .. }), "{fault}");
}

#[test]
fn divergent_barrier() {
    let mut case = case();
    let body = "setp.lt.u32 %p1, %r1, 40; @%p1 bra skip; bar.sync 0; skip:";
    let fault = case.fault(body);
    let FaultKind::MissingLanes {
        arrived: 0xffff_ff00,
        expected: 0xffff_ffff,
        elsewhere: None,
    } = &*fault.kind
    else {
        panic!("{fault}")
    };
    case.innocent(
        "setp.lt.u32 %p1, %r1, 40; @%p1 bra skip; add.u32 %r5, %r1, 1; skip: bar.sync 0;",
    );
}

#[test]
fn short_barrier() {
    let mut case = case();
    let body = "setp.lt.u32 %p1, %r1, 32; @%p1 exit; bar.sync 0;";
    let fault = case.fault(body);
    let FaultKind::ShortBarrier {
        barrier: 0,
        arrived: 32,
        expected: 64,
        ..
    } = &*fault.kind
    else {
        panic!("{fault}");
    };
    case.innocent("bar.sync 0; setp.lt.u32 %p1, %r1, 32; @%p1 exit;");
    // A GPU carries on with those that are left.
    case.config.checks.barriers = false;
    case.innocent(body);
}

#[test]
fn missing_lanes() {
    let mut case = case();
    let body = |mask: &str| {
        format!(
            "setp.ge.u32 %p1, %r1, 16; @%p1 bra skip;
             shfl.sync.bfly.b32 %r5, %r1, 1, 31, {mask}; skip:"
        )
    };
    let fault = case.fault(&body("0xffffffff"));
    let FaultKind::MissingLanes {
        arrived, expected, ..
    } = &*fault.kind
    else {
        panic!("{fault}")
    };
    assert_eq!((*arrived, *expected), (0xffff, u32::MAX));
    case.config.block = [32, 1, 1];
    case.innocent(&body("0xffff"));
    // A mask that leaves out lanes that execute it.
    let fault = case.fault("shfl.sync.bfly.b32 %r5, %r1, 1, 31, 0xffff;");
    assert!(matches!(&*fault.kind, FaultKind::Undefined(_)), "{fault}");
    // Lanes that come by another way are waited for.
    case.innocent(
        "setp.ge.u32 %p1, %r1, 16; @%p1 bra join; add.u32 %r6, %r1, 1;
         join: shfl.sync.bfly.b32 %r5, %r1, 1, 31, 0xffffffff;",
    );
}

#[test]
fn copies_read_before_their_wait() {
    let mut case = case();
    let copy = "cp.async.ca.shared.global [%r2], [%rd2], 4; cp.async.commit_group;";
    let read = "ld.shared.u32 %r5, [%r2]; st.global.u32 [%rd2], %r5;";
    let fault = case.fault(&format!("{copy} {read}"));
    let FaultKind::BeforeWait { copy: party, .. } = &*fault.kind else {
        panic!("{fault}")
    };
    assert!(party.location.instruction.starts_with("cp.async"));
    case.fault(&format!("{copy} cp.async.wait_group 1; {read}"));
    case.innocent(&format!("{copy} cp.async.wait_group 0; {read}"));
    // Waiting is each thread's own: other warps need a barrier as well.
    let other = "cp.async.wait_all; xor.b32 %r6, %r2, 128;";
    let read = "ld.shared.u32 %r5, [%r6];";
    case.config.seed = 0;
    case.fault(&format!("{copy} {other} {read}"));
    case.innocent(&format!("{copy} {other} bar.sync 0; {read}"));
}

#[test]
fn an_endless_kernel_meets_the_watchdog() {
    let mut case = case();
    case.config.max_instructions = Some(100_000);
    case.config.grid = [4, 1, 1];
    let fault = case.fault("spin: bra spin;");
    let FaultKind::Endless { limit: 100_000 } = &*fault.kind else {
        panic!("{fault}")
    };
    assert_eq!(&*fault.party.unwrap().location.instruction, "bra spin;");
    // Every thread waits for a word that nobody changes.
    let wait = "wait: ld.volatile.global.u32 %r5, [%rd1]; setp.eq.u32 %p1, %r5, 1; @%p1 bra wait;";
    let fault = case.fault(wait);
    assert!(matches!(&*fault.kind, FaultKind::Endless { .. }), "{fault}");
    // 8 warps, 3 instructions of each turn: within the limit.
    let turns = |turns: u32| {
        format!(
            "mov.u32 %r5, {turns}; go: sub.u32 %r5, %r5, 1; setp.ne.u32 %p1, %r5, 0; @%p1 bra go;"
        )
    };
    case.innocent(&turns(4000));
    assert!(matches!(
        &*case.fault(&turns(5000)).kind,
        FaultKind::Endless { .. }
    ));
}

#[test]
fn a_missing_wait_is_a_wrong_result_without_checks() {
    let mut case = case();
    case.config.checks = Checks::none();
    let body = |wait: &str| {
        format!(
            "st.shared.u32 [%r2], 7; cp.async.ca.shared.global [%r2], [%rd2], 4; {wait}
             ld.shared.u32 %r5, [%r2]; st.global.u32 [%rd2], %r5;"
        )
    };
    case.run(&body("cp.async.wait_all;")).unwrap();
    assert_eq!(download::<u32>(&case.gpu, case.data, 64), [1; 64]);
    case.run(&body("")).unwrap();
    assert_eq!(download::<u32>(&case.gpu, case.data, 64), [7; 64]);
}

#[test]
fn faults_name_the_source_line() {
    let gpu = Gpu::new(Profile::a100());
    let kernel = kernel(&gpu, BASICS, "saxpy");
    let x = upload(&gpu, &[1.0f32; 16]);
    let config = LaunchConfig {
        block: [32, 1, 1],
        ..LaunchConfig::default()
    };
    let fault = gpu
        .launch(&kernel, &config, &args![kernel, 32i32, 1.0f32, x.0, x.0])
        .unwrap_err();
    let source = fault.party.unwrap().location.source.unwrap();
    let line = include_str!("ptx/basics.cu")
        .lines()
        .nth(source.line as usize - 1)
        .unwrap();
    assert_eq!(
        (&*source.file, line.trim()),
        ("basics.cu", "if (i < n) y[i] = a * x[i] + y[i];")
    );
}

#[test]
fn counters() {
    let mut case = case();
    case.config.counters = true;
    case.config.grid = [2, 1, 1];
    let count = |body: &str| case.run(body).unwrap().counters.unwrap();
    let contiguous = count("ld.global.u32 %r5, [%rd2];");
    assert_eq!(contiguous.global_read_bytes, 2 * 64 * 4);
    assert_eq!(contiguous.global_read_sectors, 2 * 64 * 4 / 32);
    assert_eq!(contiguous.unique_read_bytes, 64 * 4);
    assert_eq!((contiguous.flops, contiguous.bank_conflicts), (0, 0));
    // A stride of two words: every other word of each sector, two lanes on each bank.
    let strided = count(
        "mul.wide.u32 %rd3, %r1, 4; add.s64 %rd2, %rd2, %rd3; ld.global.u32 %r5, [%rd2];
         add.s32 %r2, %r2, %r3; st.shared.u32 [%r2], %r5;",
    );
    assert_eq!(strided.global_read_sectors, 2 * 2 * 8);
    assert_eq!((strided.shared_accesses, strided.bank_conflicts), (4, 4));
    let work = count("fma.rn.f32 %r5, %r1, %r1, %r1; bar.sync 0; mov.b32 %r6, %r5;");
    assert_eq!(
        (work.flops, work.barriers, work.float_instructions),
        (2 * 128, 4, 4)
    );
    let branch = count("setp.lt.u32 %p1, %r1, 8; @%p1 bra l; add.u32 %r5, %r1, 1; l:");
    assert_eq!(branch.divergent_branches, 2);
}
