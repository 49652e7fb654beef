//! Names the shared library as programs ask for a CUDA driver, while its file keeps another name:
//! it answers to `libcuda.so` only in a process that opened it by its path before.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
    }
}
