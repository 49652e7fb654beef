//! AdamW. Shapes are `[tensors, elements of each]`.

use crate::case::{Case, Scope};
use crate::device::{Buffer, Device};
use anyhow::Result;
use fuselora_kernels::abi::AdamWStep;
use fuselora_kernels::elementwise::scale;
use fuselora_kernels::optimizer::{
    AdamWParam, RATE_LEN, adamw, gradient_norm, gradient_norm_workspace,
};
use fuselora_kernels::{Element, Kernels, LaunchError};

/// Parameters and what is known of each.
struct Tensors {
    params: Vec<Param>,
    rates: Buffer,
    norm: Buffer,
    workspace: Buffer,
}

struct Param {
    param: Buffer,
    grad: Buffer,
    m: Buffer,
    v: Buffer,
}

#[derive(Clone, Copy)]
struct Operation {
    name: &'static str,
    /// How often it reads or writes one of a parameter's tensors.
    accesses: u64,
    run: fn(&mut Tensors, &Kernels) -> Result<(), LaunchError>,
}

const NORM: Operation = Operation {
    name: "gradient_norm",
    accesses: 1,
    run: |tensors, kernels| {
        let gradients: Vec<_> = tensors
            .params
            .iter()
            .map(|own| own.grad.operand())
            .collect();
        let workspace = tensors.workspace.operand_mut();
        gradient_norm(kernels, &gradients, workspace, tensors.norm.operand_mut())
    },
};
const ADAMW: Operation = Operation {
    name: "adamw",
    // Four tensors are read, three of them written.
    accesses: 7,
    run: |tensors, kernels| {
        let params: Vec<_> = tensors
            .params
            .iter_mut()
            .zip(0..)
            .map(Param::operands)
            .collect();
        let (rates, norm) = (tensors.rates.operand(), tensors.norm.operand());
        adamw(kernels, &params, STEP, rates, norm)
    },
};
const CLIPPED: Operation = Operation {
    name: "gradient_norm, adamw",
    accesses: NORM.accesses + ADAMW.accesses,
    run: |tensors, kernels| {
        (NORM.run)(tensors, kernels)?;
        (ADAMW.run)(tensors, kernels)
    },
};
const EACH_TENSOR: Operation = Operation {
    name: "gradient_norm, then scale and adamw for each tensor",
    accesses: CLIPPED.accesses + 2,
    run: |tensors, kernels| {
        (NORM.run)(tensors, kernels)?;
        for (param, rate) in tensors.params.iter_mut().zip(0..) {
            scale(kernels, param.grad.operand_mut(), 1.0)?;
            let (rates, norm) = (tensors.rates.operand(), tensors.norm.operand());
            adamw(
                kernels,
                &[Param::operands((param, rate))],
                STEP,
                rates,
                norm,
            )?;
        }
        Ok(())
    },
};

const STEP: AdamWStep = AdamWStep {
    new1: 0.1,
    keep2: 0.999,
    new2: 0.001,
    eps: 1e-8,
    max_grad_norm: 1.0,
};

pub fn cases(scope: Scope) -> Vec<Case> {
    let shape: [u32; 2] = match scope {
        Scope::Tiny => [3, 100],
        Scope::Quick | Scope::Full => [64, 1 << 18],
    };
    [NORM, ADAMW, CLIPPED, EACH_TENSOR]
        .map(|operation| operation.case(shape))
        .into()
}

/// A clipped step of all tensors at once, and of each in launches of its own.
pub fn compared(shape: [u32; 2]) -> [Case; 2] {
    [CLIPPED, EACH_TENSOR].map(|operation| operation.case(shape))
}

impl Operation {
    fn case(self, shape: [u32; 2]) -> Case {
        let [tensors, elements] = shape.map(u64::from);
        Case {
            name: self.name,
            shape: shape.to_vec(),
            element: Element::F32,
            bytes: self.accesses * 4 * tensors * elements,
            flops: 0,
            make: Box::new(move |device| {
                let mut tensors = Tensors::new(device, tensors, elements)?;
                Ok(Box::new(move |kernels| (self.run)(&mut tensors, kernels)))
            }),
        }
    }
}

impl Tensors {
    fn new(device: &Device, tensors: u64, elements: u64) -> Result<Tensors> {
        let random = |len| device.random(Element::F32, len);
        let param = |_| {
            Ok(Param {
                param: random(elements)?,
                grad: random(elements)?,
                m: random(elements)?,
                v: device.empty(Element::F32, elements)?,
            })
        };
        let lengths = (0..tensors).map(|_| elements);
        Ok(Tensors {
            params: (0..tensors).map(param).collect::<Result<_>>()?,
            rates: random(tensors * RATE_LEN as u64)?,
            norm: random(1)?,
            workspace: device.empty(Element::F32, gradient_norm_workspace(lengths))?,
        })
    }
}

impl Param {
    fn operands((own, rate): (&mut Param, u32)) -> AdamWParam<'_> {
        AdamWParam {
            param: own.param.operand_mut(),
            grad: own.grad.operand(),
            m: own.m.operand_mut(),
            v: own.v.operand_mut(),
            rate,
        }
    }
}
