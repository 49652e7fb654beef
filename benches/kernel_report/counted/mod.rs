//! What the simulator counts for each kernel on a shape, launched as production launches it.

/// `run::<T>("name", ...)` for the kernel `name_f32`, `name_f16` or `name_bf16`, nothing for other names.
macro_rules! by_storage {
    ($kernel:expr, $run:ident($($argument:expr),*)) => {
        match $kernel.rsplit_once('_') {
            Some((operation, "f32")) => $run::<f32>(operation, $($argument),*),
            Some((operation, "f16")) => $run::<half::f16>(operation, $($argument),*),
            Some((operation, "bf16")) => $run::<half::bf16>(operation, $($argument),*),
            _ => Ok(None),
        }
    };
}

mod activation;
mod attention;
mod columns;
mod dora;
mod elementwise;
mod embedding;
mod linear_gradients;
mod lora_linear;
mod loss;
mod matmul;
mod nf4;
mod norm;
mod optimizer;
mod rope;

use crate::table;
use anyhow::{Context, Result};
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, ValidAsZeroBits,
};
use fuselora_kernels::{Kernels, Operand, OperandMut, Stored};
use ptxsim::{Checks, Counters, Profile};
use std::sync::Arc;

/// One launch.
pub struct Counted {
    pub kernel: String,
    shape: String,
    counters: Counters,
}

/// A place to launch on.
struct Device {
    kernels: Kernels,
    stream: Arc<CudaStream>,
}

/// How the kernels of a family are launched: on the given shape, or on one of its own. Returns the shape, or
/// nothing where the kernel is of another family.
type Launch = fn(&Device, kernel: &str, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>>;

const FAMILIES: [Launch; 14] = [
    activation::launch,
    attention::launch,
    columns::launch,
    dora::launch,
    elementwise::launch,
    embedding::launch,
    linear_gradients::launch,
    lora_linear::launch,
    loss::launch,
    matmul::launch,
    nf4::launch,
    norm::launch,
    optimizer::launch,
    rope::launch,
];

/// The types of a kernel's elements.
trait Counting: Stored + DeviceRepr + ValidAsZeroBits {}

impl<T: Stored + DeviceRepr + ValidAsZeroBits> Counting for T {}

/// Launches a kernel on `shape`, or on its own, and counts.
pub fn count(kernel: &str, shape: Option<&[u64]>) -> Result<Counted> {
    let simulator = ptxsim_driver::select("h100")?;
    simulator.set_launch(0, Checks::none(), true);
    let stream = CudaContext::new(0)?.new_stream()?;
    let device = Device {
        kernels: Kernels::new(&stream)?,
        stream,
    };
    let shape = FAMILIES
        .iter()
        .find_map(|launch| launch(&device, kernel, shape).transpose())
        .with_context(|| {
            format!("no file of benches/kernel_report/counted/ says how to launch {kernel}")
        })??;
    // A launcher may need more than one kernel.
    let launch = simulator
        .take_launches()
        .into_iter()
        .find(|launch| launch.kernel == kernel)
        .with_context(|| format!("{kernel} was not launched on this shape"))?;
    let shape = shape
        .iter()
        .map(u64::to_string)
        .collect::<Vec<_>>()
        .join("x");
    Ok(Counted {
        kernel: launch.kernel,
        shape,
        counters: launch.counters,
    })
}

/// The extents of a shape of `N` dimensions.
fn extents<const N: usize>(shape: Option<&[u64]>, own: [u64; N]) -> Result<[u64; N]> {
    match shape {
        None => Ok(own),
        Some(shape) => shape
            .try_into()
            .with_context(|| format!("this shape has {N} extents")),
    }
}

impl Device {
    /// A buffer of zeros.
    fn zeros<T: DeviceRepr + ValidAsZeroBits>(&self, count: u64) -> Result<CudaSlice<T>> {
        Ok(self.stream.alloc_zeros(usize::try_from(count)?)?)
    }

    /// A buffer of these values.
    fn upload<T: DeviceRepr>(&self, values: &[T]) -> Result<CudaSlice<T>> {
        Ok(self.stream.clone_htod(values)?)
    }

    fn operand<'a, T: Stored>(&'a self, values: &'a impl DevicePtr<T>) -> Operand<'a> {
        Operand::of(values, &self.stream)
    }

    fn operand_mut<'a, T: Stored>(
        &'a self,
        values: &'a mut impl DevicePtrMut<T>,
    ) -> OperandMut<'a> {
        OperandMut::of(values, &self.stream)
    }
}

type NamedProfile = (&'static str, fn() -> Profile);

const DEVICES: [NamedProfile; 3] = [
    ("A100", Profile::a100),
    ("H100", Profile::h100),
    ("RTX 4090", Profile::rtx4090),
];

impl Counted {
    /// Every sector once, bytes.
    fn floor(&self) -> u64 {
        self.counters.unique_read_bytes + self.counters.unique_write_bytes
    }

    /// The sectors that the accesses touch, bytes.
    fn moved(&self) -> u64 {
        32 * (self.counters.global_read_sectors + self.counters.global_write_sectors)
    }

    /// The share of the moved bytes that threads asked for.
    pub fn sectors_used(&self) -> f64 {
        let asked = self.counters.global_read_bytes + self.counters.global_write_bytes;
        asked as f64 / self.moved() as f64
    }

    /// The extra passes that bank conflicts add, per shared-memory access.
    pub fn conflicts_per_access(&self) -> f64 {
        let accesses = self.counters.shared_accesses.max(1);
        self.counters.bank_conflicts as f64 / accesses as f64
    }

    /// The least time on a device, seconds.
    fn roofline(&self, device: &Profile) -> f64 {
        let memory = self.floor() as f64 / device.bandwidth;
        let tensor = self.counters.tensor_flops as f64 / device.tensor_flops;
        let float = self.counters.flops as f64 / device.f32_flops;
        memory.max(tensor).max(float)
    }

    /// All as a Markdown table.
    pub fn table(all: &[Counted]) -> String {
        let mut head = vec![
            "kernel",
            "shape",
            "floor, KiB",
            "moved / floor",
            "sectors used",
            "conflicts",
            "tensor MFLOP",
            "other MFLOP",
        ];
        head.extend(DEVICES.iter().map(|(name, _)| *name));
        table(
            &head,
            all.iter().map(|own| {
                let mut row = vec![
                    format!("`{}`", own.kernel),
                    own.shape.clone(),
                    format!("{:.1}", own.floor() as f64 / 1024.0),
                    format!("{:.2}", own.moved() as f64 / own.floor() as f64),
                    format!("{:.0} %", 100.0 * own.sectors_used()),
                    format!("{:.2}", own.conflicts_per_access()),
                    format!("{:.2}", own.counters.tensor_flops as f64 / 1e6),
                    format!("{:.2}", own.counters.flops as f64 / 1e6),
                ];
                let times = DEVICES.iter().map(|(_, device)| own.roofline(&device()));
                row.extend(times.map(|time| format!("{:.2}", 1e6 * time)));
                row
            }),
        )
    }

    /// As JSON.
    pub fn json(&self) -> serde_json::Value {
        let counters = &self.counters;
        let roofline: serde_json::Map<_, _> = DEVICES
            .iter()
            .map(|(name, device)| ((*name).to_owned(), self.roofline(&device()).into()))
            .collect();
        serde_json::json!({
            "kernel": self.kernel,
            "shape": self.shape,
            "floor_bytes": self.floor(),
            "moved_bytes": self.moved(),
            "sectors_used": self.sectors_used(),
            "bank_conflicts": counters.bank_conflicts,
            "shared_accesses": counters.shared_accesses,
            "barriers": counters.barriers,
            "divergent_branches": counters.divergent_branches,
            "instructions": counters.instructions,
            "tensor_flops": counters.tensor_flops,
            "other_flops": counters.flops,
            "roofline_seconds": roofline,
        })
    }
}
