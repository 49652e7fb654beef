//! Every driver function that cudarc can call is there: a missing one panics inside cudarc.

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use std::path::PathBuf;
use std::process::Command;

/// cudarc's bindings of the driver API, from where cargo keeps its source.
fn bindings() -> String {
    let metadata = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--offline"])
        // Only the packages of this platform are sure to be there.
        .args([
            "--filter-platform",
            &format!("{}-unknown-linux-gnu", std::env::consts::ARCH),
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&metadata.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let cudarc = packages
        .iter()
        .find(|package| package["name"] == "cudarc")
        .unwrap();
    let manifest = PathBuf::from(cudarc["manifest_path"].as_str().unwrap());
    std::fs::read_to_string(manifest.with_file_name("src/driver/sys/mod.rs")).unwrap()
}

/// The functions that exist for CUDA 13.0, the version that the workspace asks cudarc for.
fn functions(bindings: &str) -> Vec<&str> {
    let lines: Vec<&str> = bindings.lines().collect();
    let mut names = Vec::new();
    for pair in lines.windows(2) {
        let Some(rest) = pair[1].strip_prefix("pub unsafe fn cu") else {
            continue;
        };
        let other_version =
            pair[0].starts_with("#[cfg(any(") && !pair[0].contains("\"cuda-13000\"");
        if !other_version && !rest.starts_with("lib()") {
            let name = pair[1].strip_prefix("pub unsafe fn ").unwrap_or_default();
            names.push(name.split('(').next().unwrap_or_default());
        }
    }
    names
}

#[test]
fn no_function_is_missing() {
    let bindings = bindings();
    let functions = functions(&bindings);
    assert!(
        functions.len() > 400,
        "the bindings were read: {}",
        functions.len()
    );
    let path = std::env::current_exe()
        .unwrap()
        .with_file_name("libptxsim_driver.so");
    // SAFETY: loading the library runs no code.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.unwrap();
    let missing: Vec<&str> = functions
        .into_iter()
        // SAFETY: the symbol is only looked up.
        .filter(|name| unsafe { library.get::<extern "C" fn()>(name.as_bytes()) }.is_err())
        .collect();
    assert!(missing.is_empty(), "missing: {missing:?}");
}

#[test]
fn unsupported_functions_say_so() {
    let path = std::env::current_exe()
        .unwrap()
        .with_file_name("libptxsim_driver.so");
    // SAFETY: loading the library runs no code.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.unwrap();
    for name in ptxsim_driver::UNSUPPORTED {
        // SAFETY: these functions take nothing and return a code.
        let code = unsafe {
            let function = library
                .get::<extern "C" fn() -> u32>(name.as_bytes())
                .unwrap();
            function()
        };
        assert_eq!(code, 801, "{name}");
    }
}
