//! A process that has a CUDA driver keeps it.

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use ptxsim_driver::SelectError;
use std::path::PathBuf;
use std::process::Command;

#[test]
fn another_driver_is_not_replaced() {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let (source, library) = (folder.join("driver.c"), folder.join("other_driver.so"));
    std::fs::write(&source, "int cuInit(unsigned flags) { return 100; }\n").unwrap();
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o"])
        .args([&library, &source])
        .status()
        .unwrap();
    assert!(compiled.success());
    // SAFETY: loading the library runs no code.
    let other = unsafe { Library::open(Some(&library), RTLD_NOW | RTLD_LOCAL) }.unwrap();
    let refused = ptxsim_driver::select("a100").map(|_| ()).unwrap_err();
    assert!(matches!(refused, SelectError::RealDriver), "{refused}");
    drop(other);
}
