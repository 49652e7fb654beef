//! AdamW with its moments in 8 bits. Launches `adamw_8bit.cu`.

use super::{BLOCK, check, check_rate, tables};
use crate::abi::{AdamWStep, DYNAMIC_8BIT_BLOCK, OptimizerTensor};
use crate::launch::launch;
use crate::modules;
use crate::{Element, Kernels, LaunchError, Operand, OperandMut};

/// A running mean in blocks of 256 elements.
#[derive(Debug)]
pub struct Moment8bit<'a> {
    /// The codes, `[elements]` u8.
    pub codes: OperandMut<'a>,
    /// The largest magnitude of each block, `[ceil(elements / 256)]` f32.
    pub absmax: OperandMut<'a>,
}

/// One parameter tensor with its gradient, f32, and moments, all of one length.
#[derive(Debug)]
pub struct AdamW8bitParam<'a> {
    /// The parameter.
    pub param: OperandMut<'a>,
    /// Its gradient.
    pub grad: Operand<'a>,
    /// The running mean of the gradient, in the signed map.
    pub m: Moment8bit<'a>,
    /// The running mean of the squared gradient, in the unsigned map.
    pub v: Moment8bit<'a>,
    /// Which of the rates is its own.
    pub rate: u32,
}

impl Moment8bit<'_> {
    fn check(&self, [codes, absmax]: [&'static str; 2], len: u64) -> Result<(), LaunchError> {
        self.codes.check(codes, Element::U8, len)?;
        self.codes.check_aligned(codes, 4)?;
        let blocks = len.div_ceil(u64::from(DYNAMIC_8BIT_BLOCK));
        self.absmax.check(absmax, Element::F32, blocks)
    }
}

/// [`adamw`](super::adamw) with moments that are read from 8 bits and written back to them, as bitsandbytes does on the
/// CPU; the parameter is updated with the moments as they are before they are rounded.
///
/// # Errors
/// As [`adamw`](super::adamw); when a moment's codes or absmax do not fit, or codes do not start at a multiple of 4
/// bytes.
pub fn adamw_8bit(
    kernels: &Kernels,
    params: &[AdamW8bitParam],
    step: AdamWStep,
    rates: Operand,
    norm: Operand,
) -> Result<(), LaunchError> {
    norm.check("norm", Element::F32, 1)?;
    rates.check("rates", Element::F32, rates.len())?;
    let tensors = params.iter().map(|item| {
        let AdamW8bitParam {
            param,
            grad,
            m,
            v,
            rate,
        } = item;
        check_rate(*rate, rates)?;
        check("param", param, param.len())?;
        check("grad", grad, param.len())?;
        m.check(["m", "m.absmax"], param.len())?;
        v.check(["v", "v.absmax"], param.len())?;
        Ok(OptimizerTensor {
            param: param.address(),
            grad: grad.address(),
            m: m.codes.address(),
            v: v.codes.address(),
            m_absmax: m.absmax.address(),
            v_absmax: v.absmax.address(),
            elements: param.len() as u32,
            first_block: 0,
            rate: *rate,
        })
    });
    for table in tables(tensors)? {
        // SAFETY: the kernel's parameters in order; the tensors of the table were checked.
        unsafe {
            launch!(
                kernels,
                &modules::ADAMW_8BIT,
                (table.blocks, 1, 1),
                BLOCK,
                table.table,
                step,
                rates.address(),
                norm.address(),
            );
        }
    }
    Ok(())
}
