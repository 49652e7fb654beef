//! What the tests share: a GPU, typed copies, and arguments laid out as a kernel wants them.
#![allow(dead_code, reason = "each test file uses its own part")]

use ptxsim::{DevicePtr, Gpu, Kernel, Module, Profile};

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
