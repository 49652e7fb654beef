//! RMSNorm. Shapes are `[tokens, width]`.

use crate::case::{ByRows, Case, Scope};
use crate::device::{Buffer, Device};
use anyhow::Result;
use fuselora_kernels::Element;
use fuselora_kernels::abi::NormShape;
use fuselora_kernels::elementwise::add_assign;
use fuselora_kernels::norm::rms_norm;

struct Tensors {
    shape: NormShape,
    x: Buffer,
    delta: Buffer,
    sum: Buffer,
    weight: Buffer,
    y: Buffer,
    rstd: Buffer,
}

type Operation = ByRows<Tensors>;

const FORWARD: Operation = Operation {
    name: "rms_norm forward",
    accesses: 2,
    run: |t, kernels| {
        rms_norm::forward(
            kernels,
            t.shape,
            t.x.operand(),
            t.weight.operand(),
            t.y.operand_mut(),
            t.rstd.operand_mut(),
        )
    },
};
const FORWARD_ADD: Operation = Operation {
    name: "rms_norm forward, residual added",
    accesses: 4,
    run: |t, kernels| {
        rms_norm::forward_add(
            kernels,
            t.shape,
            t.x.operand(),
            t.delta.operand(),
            t.sum.operand_mut(),
            t.weight.operand(),
            t.y.operand_mut(),
            t.rstd.operand_mut(),
        )
    },
};
const ADD_FORWARD: Operation = Operation {
    name: "add_assign, rms_norm forward",
    accesses: 3 + FORWARD.accesses,
    run: |t, kernels| {
        add_assign(kernels, t.delta.operand(), t.x.operand_mut())?;
        (FORWARD.run)(t, kernels)
    },
};
const BACKWARD: Operation = Operation {
    name: "rms_norm backward",
    accesses: 4,
    run: |t, kernels| {
        rms_norm::backward(
            kernels,
            t.shape,
            t.delta.operand(),
            t.x.operand(),
            t.rstd.operand(),
            t.weight.operand(),
            t.sum.operand_mut(),
        )
    },
};

pub fn cases(scope: Scope) -> Vec<Case> {
    let shape: [u32; 2] = match scope {
        Scope::Tiny => [9, 72],
        Scope::Quick | Scope::Full => [16384, 4096],
    };
    let mut cases = Vec::new();
    for operation in [FORWARD, FORWARD_ADD, ADD_FORWARD, BACKWARD] {
        let storage = scope.storage().iter();
        cases.extend(storage.map(|&element| operation.case(shape, element, Tensors::new)));
    }
    cases
}

/// The residual added within the norm, and before it.
pub fn compared(shape: [u32; 2], element: Element) -> [Case; 2] {
    [FORWARD_ADD, ADD_FORWARD].map(|operation| operation.case(shape, element, Tensors::new))
}

impl Tensors {
    fn new(device: &Device, [tokens, width]: [u32; 2], element: Element) -> Result<Tensors> {
        let elements = u64::from(tokens) * u64::from(width);
        let activation = || device.random(element, elements);
        Ok(Tensors {
            shape: NormShape {
                tokens,
                width,
                eps: 1e-5,
            },
            x: activation()?,
            delta: activation()?,
            sum: activation()?,
            weight: device.random(Element::F32, width.into())?,
            y: activation()?,
            rstd: device.random(Element::F32, tokens.into())?,
        })
    }
}
