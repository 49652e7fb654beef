//! Kernels compiled by nvcc against the same source compiled by the host's C++ compiler, to the bit; CUDA's
//! device math library against f64, within the error that CUDA documents.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use ptxsim::{Gpu, LaunchConfig, Profile};

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/ptx")
        .join(name)
}

/// The host's build of `oracle.cu`, made once; `None` where there is no g++.
fn host_program() -> Option<&'static Path> {
    static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
    let build = || {
        let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("oracle");
        // No contraction: a * b + c rounds twice, as nvcc was told with -fmad=false.
        let status = Command::new("g++")
            .args(["-O1", "-ffp-contract=off", "-x", "c++"])
            .arg(source("oracle.cu"))
            .arg("-o")
            .arg(&program)
            .status();
        match status {
            Ok(status) => {
                assert!(status.success(), "g++ does not compile oracle.cu");
                Some(program)
            }
            Err(_) => {
                eprintln!("skipped: the host's results need g++");
                None
            }
        }
    };
    PROGRAM.get_or_init(build).as_deref()
}

/// PTX for `name.cu`: the committed text, and nvcc's of today where there is an nvcc.
fn ptx(name: &str, flags: &[&str]) -> Vec<String> {
    let committed = std::fs::read_to_string(source(&format!("{name}.ptx"))).expect("committed PTX");
    let mut texts = vec![committed];
    match nvcc() {
        None => eprintln!("no nvcc: only the committed {name}.ptx is run"),
        Some(nvcc) => {
            let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.ptx"));
            let status = Command::new(&nvcc)
                .args(["-arch=compute_80", "-ptx"])
                .args(flags)
                .arg(source(&format!("{name}.cu")))
                .arg("-o")
                .arg(&out)
                .status()
                .expect("nvcc runs");
            assert!(
                status.success(),
                "{} does not compile {name}.cu",
                nvcc.display()
            );
            texts.push(std::fs::read_to_string(out).expect("nvcc's PTX"));
        }
    }
    texts
}

/// `NVCC`, the `PATH`, or what the workspace has provisioned.
fn nvcc() -> Option<PathBuf> {
    let toolchain = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.toolchain");
    let mut places: Vec<PathBuf> = std::env::var_os("NVCC")
        .map(PathBuf::from)
        .into_iter()
        .collect();
    let path = std::env::var_os("PATH").unwrap_or_default();
    places.extend(std::env::split_paths(&path).map(|folder| folder.join("nvcc")));
    places.extend(find_below(&toolchain, 6));
    places.into_iter().find(|place| place.is_file())
}

/// Files called `nvcc` in a folder called `bin`, at most `depth` folders below `folder`.
fn find_below(folder: &Path, depth: usize) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found = vec![folder.join("bin/nvcc")];
    if depth > 0 {
        let folders = entries
            .map(|entry| entry.path())
            .filter(|path| path.is_dir());
        found.extend(folders.flat_map(|path| find_below(&path, depth - 1)));
    }
    found
}

fn run_host(program: &Path, kernel: &str, input: &[u64]) -> Vec<u64> {
    let mut child = Command::new(program)
        .arg(kernel)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the host program starts");
    let bytes: Vec<u8> = input.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut stdin = child.stdin.take().expect("a pipe");
    let writer = std::thread::spawn(move || stdin.write_all(&bytes));
    let output = child.wait_with_output().expect("the host program ends");
    writer.join().expect("no panic").expect("all input taken");
    assert!(output.status.success());
    output
        .stdout
        .chunks_exact(8)
        .map(|b| u64::from_le_bytes(b.try_into().expect("8")))
        .collect()
}

/// Runs `kernel(input, output, n)` over `n` elements on the simulator.
fn run_simulated(ptx: &str, kernel: &str, input: &[u8], out_bytes: usize, n: u32) -> Vec<u8> {
    let gpu = Gpu::new(Profile::a100());
    let module = gpu.load(ptx).unwrap_or_else(|error| panic!("{error}"));
    let kernel = module.kernel(kernel).expect("the kernel");
    let from = gpu.alloc(input.len() as u64).expect("memory");
    let to = gpu.alloc(out_bytes as u64).expect("memory");
    gpu.write(from, input).expect("in bounds");
    let mut args = [from.0.to_le_bytes(), to.0.to_le_bytes()].concat();
    args.extend(n.to_le_bytes());
    let config = LaunchConfig {
        grid: [n.div_ceil(96), 1, 1],
        block: [96, 1, 1],
        ..LaunchConfig::default()
    };
    gpu.launch(&kernel, &config, &args)
        .unwrap_or_else(|fault| panic!("{fault}"));
    let mut out = vec![0; out_bytes];
    gpu.read(to, &mut out).expect("in bounds");
    out
}

/// Words that meet the interesting cases: random bits, small numbers, floats of like size, edges.
fn words(pairs: usize) -> Vec<u64> {
    let near_one_f64 = (any::<u64>(), 1000u64..1060)
        .prop_map(|(bits, exponent)| (bits & 0x800f_ffff_ffff_ffff) | (exponent << 52));
    let near_one_f32 = (any::<u64>(), 110u64..140)
        .prop_map(|(bits, exponent)| (bits & 0xffff_ffff_807f_ffff) | (exponent << 23));
    let edges = vec![
        0,
        1,
        u64::MAX,
        1 << 63,
        1 << 31,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        0x8000_0000,
        0x0000_0001_0000_0001,
        f64::INFINITY.to_bits(),
        f64::NAN.to_bits(),
        f64::MIN_POSITIVE.to_bits(),
        0x007f_ffff,
        0x7fff_ffff,
        0x3f80_0000,
        0.5f64.to_bits(),
    ];
    let word = prop_oneof![
        any::<u64>(),
        0u64..100,
        near_one_f64,
        near_one_f32,
        proptest::sample::select(edges)
    ];
    let mut runner = proptest::test_runner::TestRunner::default();
    let strategy = proptest::collection::vec(word, 2 * pairs);
    strategy.new_tree(&mut runner).expect("words").current()
}

#[test]
fn kernels_compute_what_the_host_computes() {
    let Some(program) = host_program() else {
        return;
    };
    for text in ptx("oracle", &["-fmad=false"]) {
        for kernel in [
            "narrow_integers",
            "wide_integers",
            "control_flow",
            "local_memory",
            "float32",
            "float64",
            "conversions",
        ] {
            let input = words(1000);
            let expected = run_host(program, kernel, &input);
            let bytes: Vec<u8> = input.iter().flat_map(|word| word.to_le_bytes()).collect();
            let out = run_simulated(&text, kernel, &bytes, 8000, 1000);
            for (i, (got, want)) in out.chunks_exact(8).zip(&expected).enumerate() {
                let got = u64::from_le_bytes(got.try_into().expect("8 bytes"));
                let (a, b) = (input[2 * i], input[2 * i + 1]);
                assert_eq!(got, *want, "{kernel}({a:#x}, {b:#x})");
            }
        }
    }
}

/// Error in units in the last place of the f32 nearest to `exact`.
fn ulps(got: f32, exact: f64) -> f64 {
    let nearest = exact as f32;
    if got == nearest || (got.is_nan() && exact.is_nan()) {
        return 0.0;
    }
    let ulp = f64::from(nearest.abs().next_up()) - f64::from(nearest.abs());
    (f64::from(got) - exact).abs() / ulp
}

/// A function of the device's math library: its kernel, the reference in f64, the maximum error in ulp that the
/// CUDA C++ Programming Guide states (for the intrinsics, the absolute error in the last column), the
/// range tested.
type MathFunction = (&'static str, fn(f64) -> f64, f64, f64, std::ops::Range<f32>);

const FUNCTIONS: &[MathFunction] = &[
    ("k_exp", f64::exp, 1.0, 0.0, -100.0..100.0),
    ("k_exp2", f64::exp2, 2.0, 0.0, -160.0..140.0),
    ("k_expm1", f64::exp_m1, 1.0, 0.0, -20.0..20.0),
    ("k_log", f64::ln, 1.0, 0.0, 0.0..1e6),
    ("k_log1p", f64::ln_1p, 1.0, 0.0, -0.999..100.0),
    ("k_sin", f64::sin, 2.0, 0.0, -1e6..1e6),
    ("k_cos", f64::cos, 2.0, 0.0, -1e6..1e6),
    ("k_tanh", f64::tanh, 2.0, 0.0, -10.0..10.0),
    ("k_rsqrt", |x| 1.0 / x.sqrt(), 2.0, 0.0, 1e-30..1e30),
    ("k_cbrt", f64::cbrt, 1.0, 0.0, -1e6..1e6),
    ("k_fast_sin", f64::sin, 0.0, 4.8e-7, -3.0..3.0),
];

#[test]
fn the_device_math_library_is_as_exact_as_documented() {
    for text in ptx("math", &[]) {
        for (kernel, reference, max_ulps, max_absolute, range) in FUNCTIONS {
            let mut runner = proptest::test_runner::TestRunner::default();
            let strategy = proptest::collection::vec(range.clone(), 2000);
            let xs = strategy.new_tree(&mut runner).expect("values").current();
            let bytes: Vec<u8> = xs.iter().flat_map(|x| x.to_le_bytes()).collect();
            let out = run_simulated(&text, kernel, &bytes, bytes.len(), xs.len() as u32);
            for (x, y) in xs.iter().zip(out.chunks_exact(4)) {
                let y = f32::from_le_bytes(y.try_into().expect("4 bytes"));
                let exact = reference(f64::from(*x));
                // Half an ulp on top: the bounds compare with the correctly rounded result.
                let close = ulps(y, exact) <= max_ulps + 0.5
                    || (f64::from(y) - exact).abs() <= *max_absolute;
                assert!(close, "{kernel}({x:e}) = {y:e}, exactly {exact:e}");
            }
        }
    }
}
