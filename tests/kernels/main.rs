//! Every kernel of `kernels/`, through its Rust launcher, against a plain f64 reference: on the
//! simulated device with every check on, and the same tests on a GPU where there is one.
//!
//! One module per family. Each lists the kernels that it tests; one that no module lists fails
//! here.
#![cfg(feature = "cuda")]

mod activation;
mod attention;
mod device;
mod elementwise;
mod embedding;
mod lora_linear;
mod loss;
mod matmul;
mod nf4;
mod norm;
mod optimizer;
mod rope;
mod storage;

use fuselora_kernels::modules;
use std::collections::BTreeSet;
use std::process::Command;

#[test]
fn every_kernel_is_tested() {
    let families = [
        activation::KERNELS,
        attention::KERNELS,
        elementwise::KERNELS,
        embedding::KERNELS,
        lora_linear::KERNELS,
        loss::KERNELS,
        matmul::KERNELS,
        nf4::KERNELS,
        norm::KERNELS,
        optimizer::KERNELS,
        rope::KERNELS,
    ];
    let tested: BTreeSet<&str> = families.concat().into_iter().collect();
    let all: BTreeSet<&str> = modules::KERNELS.iter().map(|kernel| kernel.name).collect();
    let untested: Vec<_> = all.difference(&tested).collect();
    assert!(untested.is_empty(), "no test lists {untested:?}");
    let unknown: Vec<_> = tested.difference(&all).collect();
    assert!(unknown.is_empty(), "there is no kernel {unknown:?}");
}

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
    let status = Command::new(std::env::current_exe().unwrap())
        .env(device::VARIABLE, "gpu")
        .status()
        .unwrap();
    assert!(status.success(), "the kernel tests failed on the GPU");
}
