//! The device that this process tests on.

use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, ValidAsZeroBits,
};
use fuselora_kernels::{Kernels, Operand, OperandMut, Stored};
use ptxsim::Checks;
use ptxsim_driver::Simulator;
use std::path::Path;
use std::sync::Arc;

/// Set to `gpu` in the process that tests on one.
pub const VARIABLE: &str = "FUSELORA_TEST_DEVICE";

/// Whether this process tests on a GPU.
pub fn on_gpu() -> bool {
    std::env::var(VARIABLE).is_ok_and(|device| device == "gpu")
}

/// Whether the machine has an NVIDIA GPU, by the file that its kernel driver makes (on Windows'
/// Linux, by the one that stands for it).
pub fn gpu_is_present() -> bool {
    Path::new("/dev/nvidiactl").exists() || Path::new("/usr/lib/wsl/lib/libcuda.so").exists()
}

/// The kernels, on a stream of the device.
pub struct Device {
    pub kernels: Kernels,
    stream: Arc<CudaStream>,
    simulator: Option<Simulator>,
}

impl Device {
    /// The GPU, or a simulated H100, which runs the modules of every architecture.
    pub fn open() -> Device {
        let simulator = match on_gpu() {
            true => None,
            false => Some(ptxsim_driver::select("h100").expect("the simulated driver opens")),
        };
        // A context of its own: the fault of one test does not outlive it in another, or in the
        // smaller inputs that proptest tries next.
        let context = CudaContext::new_non_primary(0, 0).expect("there is a device");
        let stream = context.new_stream().expect("a stream can be made");
        Device {
            kernels: Kernels::new(&stream).expect("the device tells its capability"),
            stream,
            simulator,
        }
    }

    /// Every check is on, and `seed` decides the order of blocks and warps; a GPU decides itself.
    pub fn shuffle(&self, seed: u64) {
        if let Some(simulator) = self.simulator {
            simulator.set_launch(seed, Checks::all(), false);
        }
    }

    /// A copy of `values` on the device.
    pub fn upload<T: DeviceRepr>(&self, values: &[T]) -> CudaSlice<T> {
        self.stream.clone_htod(values).expect("the copy succeeds")
    }

    /// A copy of the device's values.
    pub fn download<T: DeviceRepr + Clone + Default>(&self, values: &CudaSlice<T>) -> Vec<T> {
        self.stream.clone_dtoh(values).expect("the copy succeeds")
    }

    /// A buffer as a launcher takes it, to read.
    pub fn operand<'a, T: Stored>(&'a self, values: &'a impl DevicePtr<T>) -> Operand<'a> {
        Operand::of(values, &self.stream)
    }

    /// A buffer as a launcher takes it, to write.
    pub fn operand_mut<'a, T: Stored>(
        &'a self,
        values: &'a mut impl DevicePtrMut<T>,
    ) -> OperandMut<'a> {
        OperandMut::of(values, &self.stream)
    }

    /// A buffer of a pattern that no kernel should leave behind: the bytes 0xff, a NaN.
    pub fn output<T: DeviceRepr + ValidAsZeroBits>(&self, length: usize) -> CudaSlice<T> {
        let mut buffer = self
            .stream
            .alloc_zeros::<T>(length)
            .expect("memory suffices");
        let bytes = vec![0xff; buffer.num_bytes()];
        // SAFETY: the same bytes, seen as bytes; every bit pattern of the tests' types is valid.
        let mut view = unsafe { buffer.transmute_mut::<u8>(bytes.len()) }.expect("the sizes agree");
        self.stream
            .memcpy_htod(&bytes, &mut view)
            .expect("the copy succeeds");
        buffer
    }
}

/// Indices below `limit` from a seed.
pub fn indices(seed: u64, count: usize, limit: usize) -> Vec<u32> {
    let index = |x: f32| ((x + 1.0) / 2.0 * limit as f32) as u32 % limit as u32;
    numbers(seed, count).into_iter().map(index).collect()
}

/// Numbers in [-1, 1) from a seed.
pub fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    let next = || {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(count).collect()
}
