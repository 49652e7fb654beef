//! The report on every kernel: resources, traffic, roofline.

use crate::{cargo, run as run_command, setup};
use anyhow::Result;

/// Provides the compilers and the disassembler, then runs the report of the kernels' package with
/// `arguments`.
pub fn run(arguments: &[String]) -> Result<()> {
    setup::run()?;
    // The development profile is what the tests have built already.
    let mut report = cargo();
    report.args([
        "bench",
        "--quiet",
        "--profile",
        "dev",
        "--bench",
        "kernel_report",
    ]);
    report
        .args(["--package", "fuselora-kernels", "--"])
        .args(arguments);
    if setup::has_compilers() {
        let nvdisasm = setup::NVDISASM.provide()?.join("nvidia/cu13/bin/nvdisasm");
        report.env("NVDISASM", nvdisasm);
    }
    run_command(&mut report)
}
