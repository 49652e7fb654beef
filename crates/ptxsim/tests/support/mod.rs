//! What the tests share: a GPU, typed copies, and arguments laid out as a kernel wants them.
#![allow(dead_code, reason = "each test file uses its own part")]

use ptxsim::{Checks, DevicePtr, Fault, Gpu, Kernel, LaunchConfig, Module, Profile};

pub const BASICS: &str = include_str!("../ptx/basics.ptx");
pub const MATMUL: &str = include_str!("../ptx/matmul.ptx");

pub fn gpu() -> Gpu {
    Gpu::new(Profile::a100())
}

pub fn load(gpu: &Gpu, ptx: &str) -> Module {
    gpu.load(ptx).unwrap_or_else(|error| panic!("{error}"))
}

pub fn kernel(gpu: &Gpu, ptx: &str, name: &str) -> Kernel {
    load(gpu, ptx)
        .kernel(name)
        .unwrap_or_else(|| panic!("no kernel {name}"))
}

/// A number that can be copied to the device.
pub trait Number: Copy {
    const BYTES: usize;
    fn bytes(self) -> Vec<u8>;
    fn of(bytes: &[u8]) -> Self;
}

macro_rules! number {
    ($($ty:ty),*) => {$(
        impl Number for $ty {
            const BYTES: usize = size_of::<$ty>();
            fn bytes(self) -> Vec<u8> {
                self.to_le_bytes().to_vec()
            }
            fn of(bytes: &[u8]) -> $ty {
                <$ty>::from_le_bytes(bytes.try_into().unwrap())
            }
        }
    )*};
}
number!(u8, u16, u32, i32, u64, i64, f32, f64);

pub fn upload<T: Number>(gpu: &Gpu, values: &[T]) -> DevicePtr {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.bytes()).collect();
    let ptr = gpu.alloc(bytes.len() as u64).unwrap();
    gpu.write(ptr, &bytes).unwrap();
    ptr
}

pub fn download<T: Number>(gpu: &Gpu, ptr: DevicePtr, count: usize) -> Vec<T> {
    let mut bytes = vec![0; count * T::BYTES];
    gpu.read(ptr, &mut bytes).unwrap();
    bytes.chunks_exact(T::BYTES).map(T::of).collect()
}

/// Arguments one after the other, each at its parameter's offset.
pub fn arguments(kernel: &Kernel, values: &[&[u8]]) -> Vec<u8> {
    let mut out = vec![0; kernel.params_size() as usize];
    for (param, value) in kernel.params().iter().zip(values) {
        out[param.offset as usize..][..value.len()].copy_from_slice(value);
    }
    out
}

/// `args![kernel, 1i32, 2.0f32, ptr.0]`
#[macro_export]
macro_rules! args {
    ($kernel:expr, $($value:expr),* $(,)?) => {
        $crate::support::arguments(&$kernel, &[$(&$value.to_le_bytes()),*])
    };
}

/// A kernel with one pointer parameter in `%rd1`, the thread in `%r1`, its element's address in
/// `%rd2`, and 1 KiB of shared memory, whose element for the thread is at `%r2`.
pub fn small_kernel(body: &str) -> String {
    format!(
        ".version 8.0
        .target sm_80
        .address_size 64
        .visible .entry k(.param .u64 data)
        {{
            .reg .pred %p<8>;
            .reg .b16 %rs<8>;
            .reg .b32 %r<32>;
            .reg .b64 %rd<8>;
            .shared .align 16 .b8 tile[1024];
            ld.param.u64 %rd1, [data];
            mov.u32 %r1, %tid.x;
            mul.wide.u32 %rd2, %r1, 4;
            add.s64 %rd2, %rd1, %rd2;
            mov.u32 %r2, tile;
            shl.b32 %r3, %r1, 2;
            add.s32 %r2, %r2, %r3;
            mov.u32 %r4, %ctaid.x;
            {body}
            ret;
        }}"
    )
}

/// Rows and columns of the matmul's matrices.
pub const MATMUL_SIZE: usize = 128;

/// Runs the matmul's PTX on fixed inputs: the result, or the fault.
pub fn run_matmul(ptx: &str, checks: Checks, seed: u64) -> Result<Vec<f32>, Fault> {
    let gpu = gpu();
    let kernel = kernel(&gpu, ptx, "matmul");
    let values = |salt: usize| -> Vec<u16> {
        let value = |i: usize| ((i * 7 + salt) % 31) as f32 / 16.0 - 1.0;
        (0..MATMUL_SIZE * MATMUL_SIZE)
            .map(|i| half::bf16::from_f32(value(i)).to_bits())
            .collect()
    };
    let (a, b) = (upload(&gpu, &values(3)), upload(&gpu, &values(11)));
    let c = gpu.alloc((MATMUL_SIZE * MATMUL_SIZE * 4) as u64).unwrap();
    let config = LaunchConfig {
        grid: [MATMUL_SIZE as u32 / 64, MATMUL_SIZE as u32 / 64, 1],
        block: [128, 1, 1],
        checks,
        seed,
        ..LaunchConfig::default()
    };
    let size = MATMUL_SIZE as i32;
    gpu.launch(
        &kernel,
        &config,
        &args![kernel, size, size, size, a.0, b.0, c.0],
    )?;
    Ok(download(&gpu, c, MATMUL_SIZE * MATMUL_SIZE))
}

/// The matmul with its `nth` line that contains `pattern` changed by `edit`.
pub fn planted(pattern: &str, nth: usize, edit: impl Fn(&str) -> String) -> String {
    let mut seen = 0;
    let mut edited = false;
    let lines = MATMUL.lines().map(|line| {
        if line.contains(pattern) {
            seen += 1;
            if seen == nth + 1 {
                edited = true;
                return edit(line);
            }
        }
        line.to_string()
    });
    let text = lines.collect::<Vec<String>>().join("\n");
    assert!(edited, "the matmul has no line {nth} with `{pattern}`");
    text
}
