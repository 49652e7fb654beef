//! What the tests share: one at a time, a device, the kernels.
#![allow(dead_code, reason = "each test file uses its own part")]

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaContext, CudaFunction, LaunchConfig};
use cudarc::nvrtc::Ptx;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub const VECTORS: &str = include_str!("../ptx/vectors.ptx");
/// Kernels for compute capability 9.0: tensor copies, clusters.
pub const HOPPER: &str = include_str!("../../../ptxsim/tests/ptx/hopper.ptx");

/// One test at a time: they look at what the whole device has.
pub fn exclusively() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The simulated device's primary context, bound to the thread.
pub fn context() -> Arc<CudaContext> {
    ptxsim_driver::select("h100").expect("the simulated driver can be opened");
    let context = CudaContext::new(0).expect("there is a device");
    context.bind_to_thread().unwrap();
    context
}

pub fn function(context: &Arc<CudaContext>, ptx: &str, name: &str) -> CudaFunction {
    let module = context.load_module(Ptx::from_src(ptx)).unwrap();
    module.load_function(name).unwrap()
}

pub fn threads(grid: u32, block: u32) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (grid, 1, 1),
        block_dim: (block, 1, 1),
        shared_mem_bytes: 0,
    }
}

#[track_caller]
pub fn ok(result: CUresult) {
    assert_eq!(result, sys::CUresult::CUDA_SUCCESS);
}
