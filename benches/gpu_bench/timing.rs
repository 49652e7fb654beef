//! How a case is timed: its calls recorded once as a graph, replayed between two events, the median of the replays.
#![allow(dead_code, reason = "each program uses its own part")]

pub use crate::device::Call;

use crate::device::{Device, Make, turns::Turns};
use anyhow::{Context, Result};
use cudarc::driver::sys::{
    CUgraphInstantiate_flags, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED,
};

/// How long a case is run.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Of a graph, seconds: many times what starting one takes.
    pub graph: f64,
    /// Of replays that are not timed, seconds: a GPU that was idle starts with clocks that its limit of power does not
    /// let it keep.
    pub warm_up: f64,
    /// Of all replays, seconds, and at least so many of them.
    pub replays: f64,
    pub fewest_replays: usize,
    /// Sets of tensors at most.
    pub most_sets: u64,
}

impl Effort {
    /// Enough to show that a case runs.
    pub const LEAST: Effort = Effort {
        graph: 0.0,
        warm_up: 0.0,
        replays: 0.0,
        fewest_replays: 1,
        most_sets: 2,
    };
}

/// What replays of a case took, seconds per call.
#[derive(Debug, Clone, Copy)]
pub struct Timed {
    pub median: f64,
    /// The fastest and the slowest replay.
    pub range: [f64; 2],
}

/// Times calls that `make` prepares, on sets of tensors that take turns; a call touches `bytes`.
pub fn time(device: &Device, bytes: u64, effort: Effort, make: &Make) -> Result<Timed> {
    let mut turns = Turns::new(device, bytes, effort.most_sets, make)?;
    let sets = turns.len() as u64;

    // The first call loads the kernels; the second pass tells how long one takes.
    turns.run(device, sets)?;
    let once = device.seconds(|| turns.run(device, sets))? / sets as f64;
    let rounds = (effort.graph / (once * sets as f64)).clamp(1.0, 100.0) as u64;

    device
        .stream
        .begin_capture(CU_STREAM_CAPTURE_MODE_RELAXED)?;
    let recorded = turns.run(device, rounds * sets);
    let graph = device.stream.end_capture(CUgraphInstantiate_flags(0));
    recorded?;
    let graph = graph?.context("the calls launched nothing")?;

    let per_graph = (rounds * sets) as f64;
    let fitting = |seconds: f64| (seconds / (once * per_graph)) as usize;
    let replays = fitting(effort.replays).clamp(effort.fewest_replays, 100);
    let mut times = Vec::with_capacity(replays);
    for _ in 0..fitting(effort.warm_up) {
        graph.launch()?;
    }
    for _ in 0..replays {
        times.push(device.seconds(|| Ok(graph.launch()?))? / per_graph);
    }
    times.sort_by(f64::total_cmp);
    Ok(Timed {
        median: times[times.len() / 2],
        range: [times[0], times[times.len() - 1]],
    })
}
