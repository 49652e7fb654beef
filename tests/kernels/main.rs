//! Every kernel of `kernels/`, through its Rust launcher, against a plain f64 reference: on the
//! simulated device with every check on, and the same tests on a GPU where there is one.
//!
//! One module per family. Each lists the kernels that it tests.
#![cfg(feature = "cuda")]

mod activation;
mod adamw_8bit;
mod attention;
mod columns;
mod device;
mod dora;
mod elementwise;
mod embedding;
mod linear_gradients;
mod lora_linear;
mod loss;
mod matmul;
mod nf4;
mod nf4_gemv;
mod norm;
mod optimizer;
mod refusals;
mod rope;
mod segmented;
mod storage;
mod views;

use fuselora_kernels::modules;
use std::process::Command;

/// What each module tests.
const TESTED: &[&[&str]] = &[
    activation::KERNELS,
    adamw_8bit::KERNELS,
    attention::KERNELS,
    columns::KERNELS,
    dora::KERNELS,
    elementwise::KERNELS,
    embedding::KERNELS,
    linear_gradients::KERNELS,
    lora_linear::KERNELS,
    lora_linear::dropout::KERNELS,
    loss::KERNELS,
    matmul::KERNELS,
    nf4::KERNELS,
    nf4_gemv::KERNELS,
    norm::KERNELS,
    optimizer::KERNELS,
    rope::KERNELS,
    segmented::KERNELS,
];

// A kernel that no module lists fails the build of the tests, with its name.
const _: () = {
    let mut i = 0;
    while i < modules::KERNELS.len() {
        if !is_tested(modules::KERNELS[i].name) {
            panic!("{}", modules::KERNELS[i].name);
        }
        i += 1;
    }
    let (mut family, mut listed) = (0, 0);
    while family < TESTED.len() {
        listed += TESTED[family].len();
        family += 1;
    }
    assert!(
        listed == modules::KERNELS.len(),
        "a module lists what is no kernel, or lists one twice"
    );
};

const fn is_tested(name: &str) -> bool {
    let mut family = 0;
    while family < TESTED.len() {
        let mut i = 0;
        while i < TESTED[family].len() {
            if equal(TESTED[family][i], name) {
                return true;
            }
            i += 1;
        }
        family += 1;
    }
    false
}

const fn equal(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    if a.len() != b.len() {
        return false;
    }
    let mut i = 0;
    while i < a.len() {
        if a[i] != b[i] {
            return false;
        }
        i += 1;
    }
    true
}

/// How the name of a test ends that makes the device fault.
const FAULT: &str = "is_a_fault";

/// A process has one CUDA driver, so the GPU's turn takes another process.
#[test]
fn the_same_on_a_gpu() {
    if device::on_gpu() {
        return;
    }
    if !device::gpu_is_present() {
        println!("skipped: this machine has no NVIDIA GPU");
        return;
    }
    // A fault ends every context of its process on a GPU, so the tests that cause one have their own.
    for arguments in [["--skip", FAULT], ["--test-threads=1", FAULT]] {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(arguments)
            .env(device::VARIABLE, "gpu")
            .status()
            .unwrap();
        assert!(status.success(), "the kernel tests failed on the GPU");
    }
}
