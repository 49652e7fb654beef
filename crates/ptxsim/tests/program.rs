//! The program `ptxsim`, as a user runs it.

use std::path::PathBuf;
use std::process::Command;
use std::sync::LazyLock;

const PTX: &str = ".version 8.0
.target sm_80
.address_size 64
.visible .entry scale(.param .u64 data, .param .f32 factor, .param .u32 count)
{
    .reg .pred %p<2>;
    .reg .b32 %r<3>;
    .reg .f32 %f<4>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [data];
    ld.param.f32 %f1, [factor];
    ld.param.u32 %r1, [count];
    mov.u32 %r2, %tid.x;
    setp.ge.u32 %p1, %r2, %r1;
    @%p1 ret;
    mul.wide.u32 %rd2, %r2, 4;
    add.s64 %rd3, %rd1, %rd2;
    ld.global.f32 %f2, [%rd3];
    mul.f32 %f3, %f2, %f1;
    st.global.f32 [%rd3], %f3;
    ret;
}
";

static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("scale.ptx");
    std::fs::write(&file, PTX).unwrap();
    file
});

/// Runs the program on the PTX, and returns its exit code, output and error output.
fn ptxsim(command: &str, options: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_ptxsim"))
        .arg(command)
        .arg(&*FILE)
        .args(options)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap(),
        text(output.stdout),
        text(output.stderr),
    )
}

fn run(arguments: &[&str]) -> (i32, String, String) {
    let mut options = vec!["--kernel", "scale", "--block", "32"];
    options.extend(arguments.iter().flat_map(|argument| ["--arg", argument]));
    ptxsim("run", &options)
}

#[test]
fn lists_kernels() {
    let (code, output, _) = ptxsim("check", &[]);
    assert_eq!(code, 0);
    assert!(
        output.starts_with("scale: 3 parameters, 0 bytes of shared memory"),
        "{output}"
    );
}

#[test]
fn runs_a_kernel_and_shows_its_buffers() {
    let (code, output, error) = run(&["f32[10]=count", "f32:0.5", "u32:10"]);
    assert_eq!((code, error.as_str()), (0, ""));
    assert_eq!(
        output,
        "f32[10]=count: 0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, ...\n"
    );
}

#[test]
fn reports_faults_with_code_1() {
    let (code, _, error) = run(&["f32[10]=zeros", "f32:0.5", "u32:11"]);
    assert_eq!(code, 1);
    assert!(
        error.contains("out of bounds") && error.contains("thread (10,0,0)"),
        "{error}"
    );
    let (code, _, error) = run(&["f32[10]", "f32:0.5", "u32:10"]);
    assert_eq!(code, 1);
    assert!(
        error.contains("nobody wrote") || error.contains("never written"),
        "{error}"
    );
}

#[test]
fn explains_bad_calls_with_code_2() {
    for (arguments, expected) in [
        (vec!["f32[10]"], "scale takes 3 arguments, 1 are given"),
        (
            vec!["f32[10]", "f64:1", "u32:1"],
            "f64:1 has 8 bytes where the kernel takes 4",
        ),
        (vec!["f32[10]", "f32:one", "u32:1"], "one is not a number"),
        (vec!["f16[10]", "f32:1", "u32:1"], "there is no type f16"),
        (
            vec!["f32[10]=no-such-file", "f32:1", "u32:1"],
            "no-such-file: ",
        ),
    ] {
        let (code, _, error) = run(&arguments);
        assert_eq!(code, 2, "{error}");
        assert!(error.contains(expected), "{error}");
    }
    let (code, _, error) = ptxsim("run", &["--kernel", "other"]);
    assert_eq!(code, 2);
    assert!(
        error.contains("has no kernel other, it has scale"),
        "{error}"
    );
}
