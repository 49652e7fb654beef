//! The gated activation of Llama's feed-forward network: `act = silu(gate) · up`, `silu(x) = x·σ(x)`
//! (Shazeer, "GLU Variants Improve Transformer", 2020).

use crate::{Result, Tensor, check, parallel, simd};
use rayon::prelude::*;

const CHUNK: usize = 1 << 13;

/// `act = silu(gate) · up`, all of one shape and float type.
///
/// # Errors
/// On shapes, data types and devices that do not fit.
pub fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    up.check_shape("up", gate.shape())?;
    up.check_device("up", gate.device())?;
    let mut act = Tensor::empty(gate.device(), gate.shape(), gate.dtype())?;
    #[cfg(feature = "cuda")]
    if !gate.device().is_cpu() {
        gate.device().launch(|kernels| {
            fuselora_kernels::activation::swiglu_forward(
                kernels,
                gate.operand(),
                up.operand(),
                act.operand_mut(),
            )
        })?;
        return Ok(act);
    }
    let (gate, up) = (gate.f32("gate")?, up.f32("up")?);
    let chunks = (
        act.as_f32_mut()?.par_chunks_mut(CHUNK),
        gate.par_chunks(CHUNK),
        up.par_chunks(CHUNK),
    );
    parallel::for_each(chunks.into_par_iter(), |(act, gate, up)| {
        simd::vectorize(
            #[inline(always)]
            || {
                for ((act, &gate), &up) in act.iter_mut().zip(gate).zip(up) {
                    *act = gate * simd::sigmoid(gate) * up;
                }
            },
        );
    });
    Ok(act)
}

/// The backward pass, written over its inputs: `dup = dact · silu(gate)`,
/// `dgate = dact · up · σ(gate)·(1 + gate·(1 - σ(gate)))`. Returns `(dgate, dup)`.
///
/// # Errors
/// On shapes, data types and devices that do not fit.
pub fn backward(dact: &Tensor, mut gate: Tensor, mut up: Tensor) -> Result<(Tensor, Tensor)> {
    gate.check_shape("gate", dact.shape())?;
    up.check_shape("up", dact.shape())?;
    check::devices(dact.device(), [("gate", &gate), ("up", &up)])?;
    #[cfg(feature = "cuda")]
    if !dact.device().is_cpu() {
        dact.device().launch(|kernels| {
            fuselora_kernels::activation::swiglu_backward(
                kernels,
                dact.operand(),
                gate.operand_mut(),
                up.operand_mut(),
            )
        })?;
        return Ok((gate, up));
    }
    let chunks = (
        dact.f32("dact")?.par_chunks(CHUNK),
        gate.f32_mut("gate")?.par_chunks_mut(CHUNK),
        up.f32_mut("up")?.par_chunks_mut(CHUNK),
    );
    parallel::for_each(chunks.into_par_iter(), |(dact, gate, up)| {
        simd::vectorize(
            #[inline(always)]
            || {
                for ((&dact, gate), up) in dact.iter().zip(gate).zip(up) {
                    let sigmoid = simd::sigmoid(*gate);
                    let silu = *gate * sigmoid;
                    let dup = dact * silu;
                    *gate = dact * *up * (sigmoid + silu * (1.0 - sigmoid));
                    *up = dup;
                }
            },
        );
    });
    Ok((gate, up))
}
