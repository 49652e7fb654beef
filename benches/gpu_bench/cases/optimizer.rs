//! AdamW. Shapes are `[tensors, elements of each]`.

use crate::case::{Case, Scope};
use crate::device::Buffer;
use anyhow::Result;
use fuselora_kernels::Element;
use fuselora_kernels::abi::AdamWStep;
use fuselora_kernels::optimizer::{
    AdamWParam, RATE_LEN, adamw, gradient_norm, gradient_norm_workspace,
};

pub fn cases(scope: Scope) -> Vec<Case> {
    let shape: [u32; 2] = match scope {
        Scope::Tiny => [3, 100],
        Scope::Quick | Scope::Full => [64, 1 << 18],
    };
    vec![norm_case(shape), adamw_case(shape)]
}

fn norm_case(shape: [u32; 2]) -> Case {
    let [tensors, elements] = shape.map(u64::from);
    Case {
        name: "gradient_norm",
        shape: shape.to_vec(),
        element: Element::F32,
        bytes: 4 * tensors * elements,
        flops: 0,
        make: Box::new(move |device| {
            let gradients = (0..tensors)
                .map(|_| device.random(Element::F32, elements))
                .collect::<Result<Vec<Buffer>>>()?;
            let lengths = gradients.iter().map(|_| elements);
            let mut workspace = device.empty(Element::F32, gradient_norm_workspace(lengths))?;
            let mut norm = device.empty(Element::F32, 1)?;
            Ok(Box::new(move |kernels| {
                let gradients: Vec<_> = gradients.iter().map(Buffer::operand).collect();
                let workspace = workspace.operand_mut();
                gradient_norm(kernels, &gradients, workspace, norm.operand_mut())
            }))
        }),
    }
}

fn adamw_case(shape: [u32; 2]) -> Case {
    let [tensors, elements] = shape.map(u64::from);
    let step = AdamWStep {
        new1: 0.1,
        keep2: 0.999,
        new2: 0.001,
        eps: 1e-8,
        max_grad_norm: 1.0,
    };
    Case {
        name: "adamw",
        shape: shape.to_vec(),
        element: Element::F32,
        // Four tensors are read, three of them written.
        bytes: 7 * 4 * tensors * elements,
        flops: 0,
        make: Box::new(move |device| {
            let zeros = || device.empty(Element::F32, elements);
            let random = || device.random(Element::F32, elements);
            let mut params = (0..tensors)
                .map(|_| Ok([random()?, random()?, random()?, zeros()?]))
                .collect::<Result<Vec<[Buffer; 4]>>>()?;
            let rates = device.random(Element::F32, tensors * RATE_LEN as u64)?;
            let norm = device.random(Element::F32, 1)?;
            Ok(Box::new(move |kernels| {
                let params: Vec<_> = params
                    .iter_mut()
                    .zip(0..)
                    .map(|([param, grad, m, v], rate)| AdamWParam {
                        param: param.operand_mut(),
                        grad: grad.operand(),
                        m: m.operand_mut(),
                        v: v.operand_mut(),
                        rate,
                    })
                    .collect();
                adamw(kernels, &params, step, rates.operand(), norm.operand())
            }))
        }),
    }
}
