//! Element-wise kernels and activations. Shapes are `[elements]`.

use crate::case::{Case, Scope};
use crate::device::{Buffer, Device};
use anyhow::Result;
use fuselora_kernels::activation::{
    Gelu, gelu_backward, gelu_forward, swiglu_backward, swiglu_forward,
};
use fuselora_kernels::elementwise::{add_assign, cast, scale};
use fuselora_kernels::{Element, Kernels, LaunchError};

/// Tensors that a kernel takes, as many as any needs.
type Tensors = [Buffer; 3];

struct Operation {
    name: &'static str,
    /// How often it reads or writes a tensor.
    accesses: u64,
    run: fn(&mut Tensors, &Kernels) -> Result<(), LaunchError>,
}

const OPERATIONS: [Operation; 6] = [
    Operation {
        name: "add_assign",
        accesses: 3,
        run: |[x, y, _], kernels| add_assign(kernels, x.operand(), y.operand_mut()),
    },
    Operation {
        name: "scale",
        accesses: 2,
        run: |[x, ..], kernels| scale(kernels, x.operand_mut(), 1.0),
    },
    Operation {
        name: "swiglu forward",
        accesses: 3,
        run: |[gate, up, act], kernels| {
            swiglu_forward(kernels, gate.operand(), up.operand(), act.operand_mut())
        },
    },
    Operation {
        name: "swiglu backward",
        accesses: 5,
        run: |[dact, gate, up], kernels| {
            swiglu_backward(
                kernels,
                dact.operand(),
                gate.operand_mut(),
                up.operand_mut(),
            )
        },
    },
    Operation {
        name: "gelu forward",
        accesses: 2,
        run: |[x, y, _], kernels| gelu_forward(kernels, Gelu::Tanh, x.operand(), y.operand_mut()),
    },
    Operation {
        name: "gelu backward",
        accesses: 3,
        run: |[dy, x, _], kernels| {
            gelu_backward(kernels, Gelu::Tanh, dy.operand_mut(), x.operand())
        },
    },
];

pub fn cases(scope: Scope) -> Vec<Case> {
    let elements: u32 = match scope {
        Scope::Tiny => 1000,
        Scope::Quick | Scope::Full => 1 << 26,
    };
    let mut cases = vec![
        cast_case("cast from f32", Element::F32, Element::Bf16, elements),
        cast_case("cast to f32", Element::Bf16, Element::F32, elements),
    ];
    for operation in &OPERATIONS {
        cases.extend(scope.storage().iter().map(|&element| Case {
            name: operation.name,
            shape: vec![elements],
            element,
            bytes: operation.accesses * u64::from(elements) * element.size_in_bytes(),
            flops: 0,
            make: Box::new(move |device| {
                let mut tensors = tensors(device, element, elements)?;
                Ok(Box::new(move |kernels| {
                    (operation.run)(&mut tensors, kernels)
                }))
            }),
        }));
    }
    cases
}

fn cast_case(name: &'static str, from: Element, to: Element, elements: u32) -> Case {
    Case {
        name,
        shape: vec![elements],
        element: Element::Bf16,
        bytes: u64::from(elements) * (from.size_in_bytes() + to.size_in_bytes()),
        flops: 0,
        make: Box::new(move |device| {
            let x = device.random(from, elements.into())?;
            let mut y = device.empty(to, elements.into())?;
            Ok(Box::new(move |kernels| {
                cast(kernels, x.operand(), y.operand_mut())
            }))
        }),
    }
}

fn tensors(device: &Device, element: Element, elements: u32) -> Result<Tensors> {
    let random = || device.random(element, elements.into());
    Ok([random()?, random()?, random()?])
}
