//! AdamW over many tensors at once, and the global gradient norm. Launches `adamw.cu`.

mod adamw_8bit;

pub use adamw_8bit::{AdamW8bitParam, Moment8bit, adamw_8bit};

use crate::abi::{
    AdamWStep, OPTIMIZER_CHUNK, OPTIMIZER_TENSORS, OPTIMIZER_THREADS, OptimizerTable,
    OptimizerTensor,
};
use crate::launch::{GRID_X, blocks, launch};
use crate::modules;
use crate::{Element, Kernels, LaunchError, Operand, OperandMut};

/// One parameter tensor with its gradient and moments, f32, all of one length.
#[derive(Debug)]
pub struct AdamWParam<'a> {
    /// The parameter.
    pub param: OperandMut<'a>,
    /// Its gradient.
    pub grad: Operand<'a>,
    /// The running mean of the gradient.
    pub m: OperandMut<'a>,
    /// The running mean of the squared gradient.
    pub v: OperandMut<'a>,
    /// Which of the step's rates is its own.
    pub rate: u32,
}

/// The f32 values of an [`AdamWRate`](crate::abi::AdamWRate).
pub const RATE_LEN: usize = size_of::<crate::abi::AdamWRate>() / size_of::<f32>();

/// The f32 values of workspace that [`gradient_norm`] needs for gradients of these lengths.
pub fn gradient_norm_workspace(lengths: impl Iterator<Item = u64>) -> u64 {
    lengths
        .map(|length| length.div_ceil(u64::from(OPTIMIZER_CHUNK)))
        .sum()
}

/// `norm [1]` f32: the Euclidean norm of all gradients (f32) together.
///
/// # Errors
/// When a gradient is not f32, does not start at a multiple of 16 bytes or has 2^32 elements, when the workspace
/// is not of [`gradient_norm_workspace`]'s size, or the driver refuses.
pub fn gradient_norm(
    kernels: &Kernels,
    grads: &[Operand],
    workspace: OperandMut,
    norm: OperandMut,
) -> Result<(), LaunchError> {
    let needed = gradient_norm_workspace(grads.iter().map(Operand::len));
    workspace.check("workspace", Element::F32, needed)?;
    norm.check("norm", Element::F32, 1)?;
    let count = blocks("gradients", needed, 1, GRID_X)?;
    let tensors = grads.iter().map(|grad| {
        check("grad", grad, grad.len())?;
        Ok(OptimizerTensor {
            grad: grad.address(),
            elements: grad.len() as u32,
            ..OptimizerTensor::default()
        })
    });
    let mut squares = workspace.address();
    for table in tables(tensors)? {
        // SAFETY: the kernel's parameters in order; each block writes one of the workspace's values.
        unsafe {
            launch!(
                kernels,
                &modules::GRADIENT_SQUARES,
                (table.blocks, 1, 1),
                BLOCK,
                table.table,
                squares,
            );
        }
        squares += u64::from(table.blocks) * Element::F32.size_in_bytes();
    }
    // SAFETY: the kernel reads the values that the launches above wrote.
    unsafe {
        launch!(
            kernels,
            &modules::GRADIENT_NORM,
            (1, 1, 1),
            BLOCK,
            workspace.address(),
            count,
            norm.address(),
        );
    }
    Ok(())
}

/// AdamW as PyTorch computes it, after clipping the gradients by `norm [1]` f32, which [`gradient_norm`] wrote:
/// `g *= min(1, max_grad_norm/(norm + 1e-6))` where `max_grad_norm > 0`. Where the norm is not finite, nothing is
/// changed. `rates [count, RATE_LEN]` f32 are [`AdamWRate`](crate::abi::AdamWRate)s.
///
/// # Errors
/// When the tensors of a parameter are not f32, differ in length, do not start at a multiple of 16 bytes or have
/// 2^32 elements, when a parameter's rate is not there, or the driver refuses.
pub fn adamw(
    kernels: &Kernels,
    params: &[AdamWParam],
    step: AdamWStep,
    rates: Operand,
    norm: Operand,
) -> Result<(), LaunchError> {
    norm.check("norm", Element::F32, 1)?;
    rates.check("rates", Element::F32, rates.len())?;
    let tensors = params.iter().map(|item| {
        let AdamWParam {
            param,
            grad,
            m,
            v,
            rate,
        } = item;
        check_rate(*rate, rates)?;
        for (name, tensor) in [
            ("param", &**param),
            ("grad", grad),
            ("m", &**m),
            ("v", &**v),
        ] {
            check(name, tensor, param.len())?;
        }
        Ok(OptimizerTensor {
            param: param.address(),
            grad: grad.address(),
            m: m.address(),
            v: v.address(),
            elements: param.len() as u32,
            rate: *rate,
            ..OptimizerTensor::default()
        })
    });
    for table in tables(tensors)? {
        // SAFETY: the kernel's parameters in order; the tensors of the table were checked.
        unsafe {
            launch!(
                kernels,
                &modules::ADAMW,
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

const BLOCK: (u32, u32, u32) = (OPTIMIZER_THREADS, 1, 1);

/// Tensors for one launch, and its blocks.
struct Launch {
    table: OptimizerTable,
    blocks: u32,
}

fn tables(
    tensors: impl Iterator<Item = Result<OptimizerTensor, LaunchError>>,
) -> Result<Vec<Launch>, LaunchError> {
    let mut launches: Vec<Launch> = Vec::new();
    for tensor in tensors {
        let mut tensor = tensor?;
        let own = tensor.elements.div_ceil(OPTIMIZER_CHUNK);
        if own == 0 {
            continue;
        }
        let room = |launch: &Launch| {
            launch.table.count < OPTIMIZER_TENSORS && launch.blocks <= GRID_X - own
        };
        if !launches.last().is_some_and(room) {
            launches.push(Launch {
                table: OptimizerTable {
                    tensors: [OptimizerTensor::default(); OPTIMIZER_TENSORS as usize],
                    count: 0,
                },
                blocks: 0,
            });
        }
        if let Some(launch) = launches.last_mut() {
            tensor.first_block = launch.blocks;
            launch.table.tensors[launch.table.count as usize] = tensor;
            launch.table.count += 1;
            launch.blocks += own;
        }
    }
    Ok(launches)
}

fn check_rate(rate: u32, rates: Operand) -> Result<(), LaunchError> {
    if u64::from(rate) < rates.len() / RATE_LEN as u64 {
        return Ok(());
    }
    Err(LaunchError::Parameter {
        parameter: "rate",
        found: u64::from(rate),
        expected: "a parameter has one of the rates that were given",
    })
}

fn check(name: &'static str, tensor: &Operand, len: u64) -> Result<(), LaunchError> {
    if len > u64::from(u32::MAX) {
        return Err(LaunchError::Parameter {
            parameter: name,
            found: len,
            expected: "a tensor of the optimizer has at most 2^32 - 1 elements",
        });
    }
    tensor.check(name, Element::F32, len)?;
    tensor.check_aligned(name, 16)
}
