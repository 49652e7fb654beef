//! RMSNorm. Shapes are `[tokens, width]`.

use crate::case::{Case, Scope};
use crate::device::{Buffer, Device};
use anyhow::Result;
use fuselora_kernels::abi::NormShape;
use fuselora_kernels::norm::rms_norm;
use fuselora_kernels::{Element, Kernels, LaunchError};

struct Tensors {
    shape: NormShape,
    x: Buffer,
    delta: Buffer,
    sum: Buffer,
    weight: Buffer,
    y: Buffer,
    rstd: Buffer,
}

struct Operation {
    name: &'static str,
    /// How often it reads or writes an activation.
    accesses: u64,
    run: fn(&mut Tensors, &Kernels) -> Result<(), LaunchError>,
}

const OPERATIONS: [Operation; 3] = [
    Operation {
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
    },
    Operation {
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
    },
    Operation {
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
    },
];

pub fn cases(scope: Scope) -> Vec<Case> {
    let [tokens, width]: [u32; 2] = match scope {
        Scope::Tiny => [9, 72],
        Scope::Quick | Scope::Full => [16384, 4096],
    };
    let elements = u64::from(tokens) * u64::from(width);
    let mut cases = Vec::new();
    for operation in &OPERATIONS {
        cases.extend(scope.storage().iter().map(|&element| Case {
            name: operation.name,
            shape: vec![tokens, width],
            element,
            bytes: operation.accesses * elements * element.size_in_bytes(),
            flops: 0,
            make: Box::new(move |device| {
                let mut tensors = Tensors::new(device, [tokens, width], element)?;
                Ok(Box::new(move |kernels| {
                    (operation.run)(&mut tensors, kernels)
                }))
            }),
        }));
    }
    cases
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
