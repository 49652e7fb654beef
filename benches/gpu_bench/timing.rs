//! How a case is timed: its calls recorded once as a graph, replayed between two events, the median of the replays.

use crate::device::Device;
use anyhow::{Context, Result};
use cudarc::driver::sys::{
    CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, CUevent_flags::CU_EVENT_DEFAULT,
    CUgraphInstantiate_flags, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED,
};
use fuselora_kernels::{Kernels, LaunchError};

/// One call of an operation on tensors of its own.
pub type Call = Box<dyn FnMut(&Kernels) -> Result<(), LaunchError>>;

/// How long a case is run.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Of a graph, seconds: many times what starting one takes.
    pub graph: f64,
    /// Of all replays, seconds, and at least so many of them.
    pub replays: f64,
    pub fewest_replays: usize,
    /// Sets of tensors at most.
    pub most_sets: u64,
}

/// What replays of a case took, seconds per call.
#[derive(Debug, Clone, Copy)]
pub struct Timed {
    pub median: f64,
    /// The fastest and the slowest replay.
    pub range: [f64; 2],
}

/// Times calls that `make` prepares. Several sets of tensors take turns, as many as it takes that none is left in
/// the second-level cache when its turn comes again; a call touches `bytes`.
pub fn time(
    device: &Device,
    bytes: u64,
    effort: Effort,
    make: &dyn Fn(&Device) -> Result<Call>,
) -> Result<Timed> {
    let cache = device
        .stream
        .context()
        .attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?;
    let sets = (2 * u64::try_from(cache)?)
        .div_ceil(bytes)
        .clamp(2, effort.most_sets);
    let mut calls = (0..sets)
        .map(|_| make(device))
        .collect::<Result<Vec<Call>>>()?;

    // The first call loads the kernels; the second pass tells how long one takes.
    run_all(device, &mut calls)?;
    let once = seconds(device, || run_all(device, &mut calls))? / calls.len() as f64;
    let rounds = (effort.graph / (once * calls.len() as f64)).clamp(1.0, 100.0) as usize;

    device
        .stream
        .begin_capture(CU_STREAM_CAPTURE_MODE_RELAXED)?;
    let recorded = (0..rounds).try_for_each(|_| run_all(device, &mut calls));
    let graph = device.stream.end_capture(CUgraphInstantiate_flags(0));
    recorded?;
    let graph = graph?.context("the calls launched nothing")?;

    let per_graph = (rounds * calls.len()) as f64;
    let fitting = (effort.replays / (once * per_graph)).min(100.0) as usize;
    let replays = fitting.max(effort.fewest_replays);
    let mut times = Vec::with_capacity(replays);
    // A tenth of the replays brings the clocks up.
    for _ in 0..replays.div_ceil(10) {
        graph.launch()?;
    }
    for _ in 0..replays {
        times.push(seconds(device, || Ok(graph.launch()?))? / per_graph);
    }
    times.sort_by(f64::total_cmp);
    Ok(Timed {
        median: times[times.len() / 2],
        range: [times[0], times[times.len() - 1]],
    })
}

fn run_all(device: &Device, calls: &mut [Call]) -> Result<()> {
    for call in calls {
        call(&device.kernels)?;
    }
    Ok(())
}

/// What the device takes for the work that `submit` gives it.
pub fn seconds(device: &Device, submit: impl FnOnce() -> Result<()>) -> Result<f64> {
    let context = device.stream.context();
    let event = || context.new_event(Some(CU_EVENT_DEFAULT));
    let (start, end) = (event()?, event()?);
    start.record(&device.stream)?;
    submit()?;
    end.record(&device.stream)?;
    end.synchronize()?;
    Ok(f64::from(start.elapsed_ms(&end)?) / 1e3)
}
