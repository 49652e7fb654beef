//! DoRA, and the gradients of what is trained whole. Shapes are `[tokens, features]`; those of a weight's norms
//! `[out_features, in_features, rank]`, those of its gradient `[tokens, out_features, in_features]`.

use crate::case::{ByRows, Case, Scope};
use crate::device::{Buffer, Device};
use anyhow::Result;
use fuselora_kernels::abi::{ColumnSumShape, DoraWeight};
use fuselora_kernels::{Element, dora, linear_gradients};

struct Tensors {
    shape: ColumnSumShape,
    dy: Buffer,
    z: Buffer,
    y: Buffer,
    gain: Buffer,
    norm: Buffer,
    sums: Buffer,
}

type Operation = ByRows<Tensors>;

const OPERATIONS: [Operation; 3] = [
    Operation {
        name: "dora forward",
        accesses: 2,
        run: |t, kernels| {
            let (z, gain) = (t.z.operand(), t.gain.operand());
            dora::forward(kernels, t.shape, z, gain, None, t.y.operand_mut())
        },
    },
    Operation {
        name: "dora backward",
        accesses: 3,
        run: |t, kernels| {
            dora::backward(
                kernels,
                t.shape,
                t.dy.operand(),
                t.z.operand(),
                t.gain.operand(),
                t.norm.operand(),
                t.y.operand_mut(),
                t.sums.operand_mut(),
            )
        },
    },
    Operation {
        name: "bias gradient",
        accesses: 1,
        run: |t, kernels| {
            let dy = t.dy.operand();
            linear_gradients::bias(kernels, t.shape, dy, 1.0, t.sums.operand_mut())
        },
    },
];

pub fn cases(scope: Scope) -> Vec<Case> {
    let [activations, weight, layer] = match scope {
        Scope::Tiny => [vec![9, 72], vec![40, 72, 4], vec![9, 40, 72]],
        Scope::Quick | Scope::Full => [
            vec![16384, 4096],
            vec![4096, 4096, 16],
            vec![8192, 4096, 4096],
        ],
    };
    let mut cases = Vec::new();
    for &element in scope.storage() {
        for operation in OPERATIONS {
            let shape = [activations[0], activations[1]];
            cases.push(operation.case(shape, element, Tensors::new));
        }
        cases.push(weight_norm([weight[0], weight[1], weight[2]], element));
        cases.push(weight_gradient([layer[0], layer[1], layer[2]], element));
    }
    cases
}

impl Tensors {
    fn new(device: &Device, [tokens, features]: [u32; 2], element: Element) -> Result<Tensors> {
        let elements = u64::from(tokens) * u64::from(features);
        let activation = || device.random(element, elements);
        let vector = || device.random(Element::F32, features.into());
        Ok(Tensors {
            shape: ColumnSumShape { tokens, features },
            dy: activation()?,
            z: activation()?,
            y: activation()?,
            gain: vector()?,
            norm: vector()?,
            sums: vector()?,
        })
    }
}

fn weight_norm(shape: [u32; 3], element: Element) -> Case {
    let [rows, in_features, rank] = shape;
    let [out, columns, ranks] = shape.map(u64::from);
    let adapter = ranks * (out + columns);
    Case {
        name: "dora weight norm",
        shape: shape.to_vec(),
        element,
        bytes: out * columns * element.size_in_bytes() + 4 * (adapter + out),
        flops: 0,
        make: Box::new(move |device| {
            let weight = device.random(element, out * columns)?;
            let a = device.random(Element::F32, ranks * columns)?;
            let b = device.random(Element::F32, out * ranks)?;
            let mut norm = device.random(Element::F32, out)?;
            let shape = DoraWeight {
                first_row: 0,
                rows,
                in_features,
                rank,
                scaling: 2.0,
            };
            Ok(Box::new(move |kernels| {
                let (a, b) = (a.operand(), b.operand());
                dora::weight_norm(kernels, shape, weight.operand(), a, b, norm.operand_mut())
            }))
        }),
    }
}

fn weight_gradient(shape: [u32; 3], element: Element) -> Case {
    let [depth, out, columns] = shape.map(u64::from);
    Case {
        name: "weight gradient",
        shape: shape.to_vec(),
        element,
        bytes: depth * (out + columns) * element.size_in_bytes() + 8 * out * columns,
        flops: 2 * depth * out * columns,
        make: Box::new(move |device| {
            let dy = device.random(element, depth * out)?;
            let x = device.random(element, depth * columns)?;
            let mut dw = device.random(Element::F32, out * columns)?;
            Ok(Box::new(move |kernels| {
                let [tokens, out, columns] = shape;
                let (dy, x) = (dy.operand(), x.operand());
                linear_gradients::weight(kernels, tokens, out, columns, dy, x, dw.operand_mut())
            }))
        }),
    }
}
