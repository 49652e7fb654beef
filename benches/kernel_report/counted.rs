//! What the simulator counts for each kernel on a shape, launched as production launches it.

use crate::table;
use anyhow::{Context, Result, bail};
use cudarc::driver::{CudaContext, CudaStream, ValidAsZeroBits};
use fuselora_kernels::Kernels;
use fuselora_kernels::abi::MatmulShape;
use fuselora_kernels::matmul::{Layout, matmul};
use fuselora_kernels::nf4::{Absmax, Nf4Output, dequantize};
use half::{bf16, f16};
use ptxsim::{Checks, Counters, Profile};
use std::sync::Arc;

/// One launch.
pub struct Counted {
    kernel: String,
    shape: String,
    counters: Counters,
}

/// A place to launch on.
struct Device {
    kernels: Kernels,
    stream: Arc<CudaStream>,
}

/// Launches a kernel on `shape`, or on its own, and counts.
pub fn count(kernel: &str, shape: Option<&[u64]>) -> Result<Counted> {
    let simulator = ptxsim_driver::select("h100")?;
    simulator.set_launch(0, Checks::none(), true);
    let context = CudaContext::new(0)?;
    let device = Device {
        kernels: Kernels::new(&context)?,
        stream: context.new_stream()?,
    };
    let shape = match kernel {
        "matmul_f32_nn" => device.matmul(Layout::Nn, shape)?,
        "matmul_f32_nt" => device.matmul(Layout::Nt, shape)?,
        "matmul_f32_tn" => device.matmul(Layout::Tn, shape)?,
        "nf4_dequantize_f32" => device.nf4::<f32>(false, shape)?,
        "nf4_dequantize_f16" => device.nf4::<f16>(false, shape)?,
        "nf4_dequantize_bf16" => device.nf4::<bf16>(false, shape)?,
        "nf4_dequantize_nested_f32" => device.nf4::<f32>(true, shape)?,
        "nf4_dequantize_nested_f16" => device.nf4::<f16>(true, shape)?,
        "nf4_dequantize_nested_bf16" => device.nf4::<bf16>(true, shape)?,
        _ => bail!("benches/kernel_report/counted.rs does not say how to launch {kernel}"),
    };
    let launch = simulator
        .take_launches()
        .pop()
        .context("the launch was not counted")?;
    anyhow::ensure!(
        launch.kernel == kernel,
        "launched {} for {kernel}",
        launch.kernel
    );
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
    fn matmul(&self, layout: Layout, shape: Option<&[u64]>) -> Result<Vec<u64>> {
        let [m, n, k] = extents(shape, [256, 256, 256])?;
        let zeros = |count: u64| self.stream.alloc_zeros::<f32>(count as usize);
        let (a, b, mut c) = (zeros(m * k)?, zeros(k * n)?, zeros(m * n)?);
        let extents = MatmulShape {
            m: m.try_into()?,
            n: n.try_into()?,
            k: k.try_into()?,
        };
        matmul(
            &self.kernels,
            &self.stream,
            layout,
            extents,
            &a.as_view(),
            &b.as_view(),
            &mut c.as_view_mut(),
        )?;
        Ok(vec![m, n, k])
    }

    fn nf4<T: Nf4Output + ValidAsZeroBits>(
        &self,
        nested: bool,
        shape: Option<&[u64]>,
    ) -> Result<Vec<u64>> {
        let [elements, block_size] = extents(shape, [1 << 20, 64])?;
        let blocks = elements.div_ceil(block_size.max(1)) as usize;
        let packed = self
            .stream
            .alloc_zeros::<u8>(elements.div_ceil(2) as usize)?;
        let absmax = self.stream.alloc_zeros::<f32>(blocks)?;
        let codes = self.stream.alloc_zeros::<u8>(blocks)?;
        let quant_map = self.stream.alloc_zeros::<f32>(256)?;
        let outer = self.stream.alloc_zeros::<f32>(blocks.div_ceil(256))?;
        let mut out = self.stream.alloc_zeros::<T>(elements as usize)?;
        let (plain, codes) = (absmax.as_view(), codes.as_view());
        let (quant_map, outer) = (quant_map.as_view(), outer.as_view());
        let statistics = match nested {
            false => Absmax::Plain(&plain),
            true => Absmax::Nested {
                absmax: &codes,
                nested_quant_map: &quant_map,
                nested_absmax: &outer,
                offset: 0.0,
            },
        };
        dequantize(
            &self.kernels,
            &self.stream,
            &packed.as_view(),
            statistics,
            block_size.try_into()?,
            &mut out.as_view_mut(),
        )?;
        Ok(vec![elements, block_size])
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
    fn sectors_used(&self) -> f64 {
        let asked = self.counters.global_read_bytes + self.counters.global_write_bytes;
        asked as f64 / self.moved() as f64
    }

    fn conflicts_per_access(&self) -> f64 {
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
