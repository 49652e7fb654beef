//! AdamW with its moments in 8 bits.

#[cfg(feature = "cuda")]
use fuselora_kernels::optimizer as kernel;
use rayon::prelude::*;

use super::{AdamWHyper, AdamWRates, clip};
use crate::dynamic_8bit::{BLOCK_SIZE, Dynamic8bit};
use crate::{DType, Device, Result, Shape, Tensor, check, parallel, simd};

/// Blocks that make one task.
const TASK_BLOCKS: usize = 32;

/// A running mean in bitsandbytes' 8-bit dynamic data type: each block of 256 elements by its largest magnitude and a
/// code per element.
#[derive(Debug)]
pub struct Moment8bit {
    /// The codes, in the parameter's shape, U8.
    pub codes: Tensor,
    /// The largest magnitude of each block, `[⌈elements / 256⌉]` F32.
    pub absmax: Tensor,
}

impl Moment8bit {
    /// A mean of zeros for a parameter of this shape.
    ///
    /// # Errors
    /// No room on the device.
    pub fn zeros(device: &Device, shape: &Shape) -> Result<Moment8bit> {
        let blocks = shape.iter().product::<usize>().div_ceil(BLOCK_SIZE);
        Ok(Moment8bit {
            codes: Tensor::zeros(device, shape.clone(), DType::U8)?,
            absmax: Tensor::zeros(device, [blocks], DType::F32)?,
        })
    }

    #[cfg(feature = "cuda")]
    fn operand_mut(&mut self) -> kernel::Moment8bit<'_> {
        kernel::Moment8bit {
            codes: self.codes.operand_mut(),
            absmax: self.absmax.operand_mut(),
        }
    }

    fn check(&self, names: [&'static str; 2], param: &Tensor) -> Result<()> {
        let [codes, absmax] = names;
        self.codes.check_dtype(codes, DType::U8)?;
        self.codes.check_shape(codes, param.shape())?;
        let blocks = param.element_count().div_ceil(BLOCK_SIZE);
        self.absmax.check_dtype(absmax, DType::F32)?;
        self.absmax.check_shape(absmax, &[blocks])
    }
}

/// One parameter tensor with its gradient, both F32, and its state.
pub struct AdamW8bitParam<'a> {
    /// The parameter.
    pub param: &'a mut Tensor,
    /// Its gradient.
    pub grad: &'a Tensor,
    /// The running mean of the gradient, in the signed map.
    pub m: &'a mut Moment8bit,
    /// The running mean of the squared gradient, in the unsigned map.
    pub v: &'a mut Moment8bit,
    /// Which of the [`AdamWRates`] is its own.
    pub rate: usize,
}

/// [`adamw`](super::adamw) with moments that are read from 8 bits and written back to them (Dettmers et al., "8-bit
/// Optimizers via Block-wise Quantization", 2022; bitsandbytes' `optimizer_update_8bit_blockwise` on the CPU). The
/// parameter is updated with the moments as they are before they are rounded.
///
/// # Errors
/// As [`adamw`](super::adamw).
pub fn adamw_8bit(
    params: &mut [AdamW8bitParam],
    hyper: AdamWHyper,
    rates: &AdamWRates,
    norm: &Tensor,
) -> Result<()> {
    norm.check_shape("norm", &[1])?;
    rates.check(norm.device(), params.iter().map(|item| item.rate))?;
    for AdamW8bitParam {
        param, grad, m, v, ..
    } in &*params
    {
        grad.check_shape("grad", param.shape())?;
        m.check(["m", "m.absmax"], param)?;
        v.check(["v", "v.absmax"], param)?;
        let all = [
            ("param", &**param),
            ("grad", grad),
            ("m", &m.codes),
            ("m.absmax", &m.absmax),
            ("v", &v.codes),
            ("v.absmax", &v.absmax),
        ];
        check::devices(norm.device(), all)?;
    }
    if params.is_empty() {
        return Ok(());
    }
    #[cfg(feature = "cuda")]
    if !norm.device().is_cpu() {
        let step = hyper.for_kernels();
        let params: Vec<_> = params
            .iter_mut()
            .map(|item| kernel::AdamW8bitParam {
                param: item.param.operand_mut(),
                grad: item.grad.operand(),
                m: item.m.operand_mut(),
                v: item.v.operand_mut(),
                // A rate is one of those that a tensor holds, of fewer than 2^32 parameters.
                rate: item.rate as u32,
            })
            .collect();
        return norm.device().launch(|kernels| {
            kernel::adamw_8bit(kernels, &params, step, rates.0.operand(), norm.operand())
        });
    }
    let Some(clip) = clip(norm, hyper.max_grad_norm)? else {
        return Ok(());
    };
    let [new1, keep2, new2] = hyper.factors();
    for item in params {
        let [decay, step_size, inv_sqrt_correction2] = rates.values(item.rate)?;
        let step = Step {
            clip,
            new1,
            keep2,
            new2,
            inv_sqrt_correction2,
            eps: hyper.eps,
            decay,
            step_size,
        };
        let (m, v) = (&mut *item.m, &mut *item.v);
        let elements = TASK_BLOCKS * BLOCK_SIZE;
        let tasks = (
            item.param.f32_mut("param")?.par_chunks_mut(elements),
            item.grad.f32("grad")?.par_chunks(elements),
            m.codes.bytes_mut("m")?.par_chunks_mut(elements),
            m.absmax.f32_mut("m.absmax")?.par_chunks_mut(TASK_BLOCKS),
            v.codes.bytes_mut("v")?.par_chunks_mut(elements),
            v.absmax.f32_mut("v.absmax")?.par_chunks_mut(TASK_BLOCKS),
        );
        parallel::for_each(
            tasks.into_par_iter(),
            |(param, grad, m, m_absmax, v, v_absmax)| {
                let blocks = param
                    .chunks_mut(BLOCK_SIZE)
                    .zip(grad.chunks(BLOCK_SIZE))
                    .zip(m.chunks_mut(BLOCK_SIZE).zip(m_absmax))
                    .zip(v.chunks_mut(BLOCK_SIZE).zip(v_absmax));
                for (((param, grad), m), v) in blocks {
                    simd::vectorize(
                        #[inline(always)]
                        || step.block(param, grad, m, v),
                    );
                }
            },
        );
    }
    Ok(())
}

/// What all elements of a parameter share.
struct Step {
    clip: f32,
    new1: f32,
    keep2: f32,
    new2: f32,
    inv_sqrt_correction2: f32,
    eps: f32,
    decay: f32,
    step_size: f32,
}

impl Step {
    /// One block of at most [`BLOCK_SIZE`] elements, with the codes and the largest magnitude of its moments.
    #[inline(always)]
    fn block(
        &self,
        param: &mut [f32],
        grad: &[f32],
        (m_codes, m_absmax): (&mut [u8], &mut f32),
        (v_codes, v_absmax): (&mut [u8], &mut f32),
    ) {
        let (signed, unsigned) = (Dynamic8bit::signed(), Dynamic8bit::unsigned());
        let [mut m, mut v] = [[0.0; BLOCK_SIZE]; 2];
        let (m, v) = (&mut m[..param.len()], &mut v[..param.len()]);
        signed.dequantize(m_codes, *m_absmax, m);
        unsigned.dequantize(v_codes, *v_absmax, v);
        let moments = m.iter_mut().zip(&mut *v);
        for ((p, &g), (m, v)) in param.iter_mut().zip(grad).zip(moments) {
            let g = g * self.clip;
            *m += self.new1 * (g - *m);
            *v = self.keep2 * *v + self.new2 * g * g;
            let denominator = v.sqrt() * self.inv_sqrt_correction2 + self.eps;
            *p = *p * self.decay - self.step_size * *m / denominator;
        }
        *m_absmax = signed.quantize(m, m_codes);
        *v_absmax = unsigned.quantize(v, v_codes);
    }
}
