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

/// PTX that nvcc wrote.
const BASICS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/ptx/basics.ptx");
const HOPPER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/ptx/hopper.ptx");
const MATMUL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/ptx/matmul.ptx");

/// Runs the program, and returns its exit code, output and error output.
fn program(words: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ptxsim"));
    let output = command.args(words).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap(),
        text(output.stdout),
        text(output.stderr),
    )
}

/// Runs a command of the program on the PTX.
fn ptxsim(command: &str, options: &[&str]) -> (i32, String, String) {
    let mut words = vec![command, FILE.to_str().unwrap()];
    words.extend(options);
    program(&words)
}

/// Runs `saxpy`, `y[i] = a * x[i] + y[i]`, of the PTX that nvcc wrote.
fn saxpy(arguments: &[&str; 4], options: &[&str]) -> (i32, String, String) {
    let mut words = vec!["run", BASICS, "--kernel", "saxpy", "--block", "32"];
    words.extend(options);
    words.extend(arguments.iter().flat_map(|argument| ["--arg", argument]));
    program(&words)
}

fn run(arguments: &[&str]) -> (i32, String, String) {
    let mut options = vec!["--kernel", "scale", "--block", "32"];
    options.extend(arguments.iter().flat_map(|argument| ["--arg", argument]));
    ptxsim("run", &options)
}

#[test]
fn lists_kernels() {
    let (code, output, _) = program(&["check", FILE.to_str().unwrap(), BASICS]);
    assert_eq!(code, 0);
    let scale = "  scale\n    parameters     3, of 8, 4, 4 bytes\n    registers      at most ";
    assert!(output.contains(scale), "{output}");
    assert!(output.contains("basics.ptx\n  "), "{output}");
}

#[test]
fn refuses_what_it_cannot_read() {
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("unknown.ptx");
    std::fs::write(&file, PTX.replace("mul.f32", "mul.up.f32")).unwrap();
    let (code, _, error) = program(&["check", file.to_str().unwrap()]);
    assert_eq!(code, 1);
    let lines: Vec<&str> = error.lines().collect();
    assert!(
        lines[0].ends_with("PTX line 19, column 5: modifier `.up` of `mul` is not modelled"),
        "{error}"
    );
    let column = lines[2].find('^').unwrap();
    assert!(lines[1][column..].starts_with("mul.up.f32"), "{error}");
    // An A100 cannot run what is made for an H100, and the files beside it are listed all the same.
    let (code, output, error) = program(&["check", HOPPER, BASICS, "--profile", "a100"]);
    assert_eq!(code, 1);
    assert!(error.contains("sm_90a"), "{error}");
    assert!(output.contains("saxpy"), "{output}");
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
fn takes_numbers_and_shows_as_many_as_asked() {
    let arguments = ["i32:3", "f32:2", "f32[3]=1,2,3", "f32[3]=10,20.5,-30"];
    let (code, output, error) = saxpy(&arguments, &["--show", "2"]);
    assert_eq!((code, error.as_str()), (0, ""));
    assert_eq!(
        output,
        "f32[3]=1,2,3: 1, 2, ...\nf32[3]=10,20.5,-30: 12, 24.5, ...\n"
    );
}

#[test]
fn fills_a_buffer_with_one_number() {
    let arguments = ["i32:3", "f32:2", "f32[3]=0.5", "f32[3]=-1"];
    let (code, output, _) = saxpy(&arguments, &[]);
    assert_eq!(code, 0);
    assert!(output.ends_with("f32[3]=-1: 0, 0, 0\n"), "{output}");
}

#[test]
fn takes_structs_and_files() {
    // struct { float scale; int n; float *out; char filler[100]; }: null, so nothing but n = 0 works.
    let params = format!("hex:0000803f00000000{}", "00".repeat(112));
    let by_value = ["run", BASICS, "--kernel", "by_value", "--arg", &params];
    assert_eq!(program(&by_value), (0, String::new(), String::new()));
    let one = params.replacen("3f00", "3f01", 1);
    let (code, _, error) = program(&["run", BASICS, "--kernel", "by_value", "--arg", &one]);
    assert_eq!(code, 1);
    assert!(error.contains("null pointer"), "{error}");
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("numbers.bin");
    std::fs::write(&file, 1.5f32.to_le_bytes()).unwrap();
    let file = format!("f32[1]={}", file.display());
    let (code, output, error) = saxpy(&["i32:1", "f32:2", &file, "f32[1]=zeros"], &[]);
    assert_eq!((code, error.as_str()), (0, ""));
    assert!(output.ends_with("f32[1]=zeros: 3\n"), "{output}");
}

#[test]
fn knows_the_16_bit_types() {
    // a * b + 0.5 on pairs.
    let arguments = ["bf16[2]=1.5,-2", "bf16[2]=3,0.25", "bf16[2]"];
    let mut words = vec!["run", BASICS, "--kernel", "bf16_pairs"];
    words.extend(arguments.iter().flat_map(|argument| ["--arg", argument]));
    let (code, output, error) = program(&words);
    assert_eq!((code, error.as_str()), (0, ""));
    assert!(output.ends_with("bf16[2]: 5, 0\n"), "{output}");
}

#[test]
fn prints_what_the_kernel_prints() {
    let say = program(&["run", BASICS, "--kernel", "say", "--arg", "i32:5"]);
    let text = "thread 0 of 1:  2.50 text 1099511627776\n";
    assert_eq!(say, (0, text.to_string(), String::new()));
}

#[test]
fn counts_on_request() {
    let arguments = ["i32:3", "f32:2", "f32[3]=count", "f32[3]=count"];
    let (_, output, _) = saxpy(&arguments, &["--counters"]);
    let counted = |label: &str| {
        let line = output.lines().find(|line| line.starts_with(label)).unwrap();
        line[label.len()..].trim().parse::<u64>().unwrap()
    };
    assert_eq!(counted("other FLOPs"), 3 * 2);
    assert_eq!(counted("global bytes read"), 2 * 3 * 4);
    assert_eq!(counted("global bytes written"), 3 * 4);
}

#[test]
fn checks_can_be_turned_off() {
    let arguments = ["i32:3", "f32:2", "f32[3]", "f32[3]"];
    let (code, _, error) = saxpy(&arguments, &[]);
    assert_eq!(code, 1);
    assert!(error.contains("basics.cu:"), "{error}");
    assert_eq!(saxpy(&arguments, &["--no-checks"]).0, 0);
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
        (vec!["f12[10]", "f32:1", "u32:1"], "there is no type f12"),
        (
            vec!["f32[10]", "f32:1", "u32:4294967296"],
            "4294967296 is not a number that u32 can hold",
        ),
        (
            vec!["f32[2]=1,2,3", "f32:1", "u32:1"],
            "gives 12 bytes, f32[2] has 8",
        ),
        (
            vec!["f32[0]", "f32:1", "u32:1"],
            "0 is not a number of elements",
        ),
        (
            vec!["f32", "f32:1", "u32:1"],
            "neither TYPE:NUMBER nor TYPE[COUNT]",
        ),
        (
            vec!["f32[99999999999]", "f32:1", "u32:1"],
            "out of device memory",
        ),
        (
            vec!["f32[10]=no-such-file", "f32:1", "u32:1"],
            "no-such-file: ",
        ),
    ] {
        let (code, _, error) = run(&arguments);
        assert_eq!(code, 2, "{error}");
        assert!(error.contains(expected), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    for (words, expected) in [
        (&["look"][..], "look is not a command"),
        (&["check"], "name the PTX file"),
        (&["check", "no-such-file"], "cannot read no-such-file"),
        (&["run", BASICS, "--shape", "1"], "no option --shape"),
        (
            &["run", BASICS, "--grid", "1,2,3,4"],
            "at most three dimensions",
        ),
        (&["run", BASICS, "--profile", "gtx"], "no profile gtx"),
        (
            &[
                "run", BASICS, "--kernel", "count", "--arg", "i32:1", "--block", "2000",
            ],
            "2000 threads",
        ),
    ] {
        let (code, _, error) = program(words);
        assert_eq!(code, 2, "{error}");
        assert!(error.contains(expected), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    let (code, _, error) = ptxsim("run", &["--kernel", "other"]);
    assert_eq!(code, 2);
    assert!(
        error.contains("has no kernel other, it has scale"),
        "{error}"
    );
}

#[test]
fn the_readme_shows_what_it_prints() {
    let readme = include_str!("../README.md");
    let shown = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ptxsim"));
        command.current_dir(env!("CARGO_MANIFEST_DIR")).args(words);
        let output = String::from_utf8(command.output().unwrap().stdout).unwrap();
        assert!(!output.is_empty() && readme.contains(&output), "{output}");
    };
    shown(&["check", "tests/ptx/matmul.ptx"]);
    let words = "run tests/ptx/basics.ptx --kernel saxpy --block 4 \
        --arg i32:4 --arg f32:2 --arg f32[4]=1,2,3,4 --arg f32[4]=1";
    shown(&words.split_whitespace().collect::<Vec<_>>());
    // The counters of the matmul, behind its three buffers.
    let words = "run tests/ptx/matmul.ptx --kernel matmul --grid 2,2 --block 128 --counters \
        --arg i32:128 --arg i32:128 --arg i32:128 \
        --arg bf16[16384]=0.5 --arg bf16[16384]=0.5 --arg f32[16384]";
    let (code, output, _) = program(
        &words
            .replace("tests/ptx/matmul.ptx", MATMUL)
            .split_whitespace()
            .collect::<Vec<_>>(),
    );
    assert_eq!(code, 0);
    let (_, counters) = output.split_once("warp instructions").unwrap();
    assert!(readme.contains(counters), "{output}");
}
