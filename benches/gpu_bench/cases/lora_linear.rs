//! The linear layer with its low-rank update. Shapes are `[tokens, in_features, out_features, rank]`.

use crate::case::{Case, STORAGE, Scope};
use crate::device::Device;
use crate::lora_layer::{Fused, Shape, Unfused, Wanted};
use crate::timing::Call;
use anyhow::Result;
use fuselora_kernels::{Element, Kernels, LaunchError};

const RANK: u32 = 16;

/// Projections of Llama 3.2 1B and 3.1 8B: q and o, k and v, gate and up, down.
const LLAMA_1B: [[u32; 2]; 4] = [[2048, 2048], [2048, 512], [2048, 8192], [8192, 2048]];
const LLAMA_8B: [[u32; 2]; 4] = [[4096, 4096], [4096, 1024], [4096, 14336], [14336, 4096]];

/// The shape that the others are judged beside.
const MAIN: Shape = Shape {
    tokens: 8192,
    in_features: 4096,
    out_features: 4096,
    rank: RANK,
};

pub fn cases(scope: Scope) -> Vec<Case> {
    let (main, others) = match scope {
        Scope::Tiny => (
            Shape {
                tokens: 48,
                in_features: 64,
                out_features: 80,
                rank: RANK,
            },
            Vec::new(),
        ),
        Scope::Quick => (MAIN, shapes(&[4096], &LLAMA_1B)),
        Scope::Full => (
            MAIN,
            [
                shapes(&[128, 1024, 4096, 16384], &LLAMA_1B),
                shapes(&[128, 2048], &LLAMA_8B),
            ]
            .concat(),
        ),
    };
    let mut cases = Vec::new();
    for element in STORAGE {
        cases.extend(OPERATIONS.map(|operation| operation.case(main, element)));
    }
    for shape in others {
        let whole = [FORWARD_BACKWARD, UNFUSED_FORWARD_BACKWARD];
        cases.extend(whole.map(|operation| operation.case(shape, Element::Bf16)));
    }
    cases
}

fn shapes(tokens: &[u32], projections: &[[u32; 2]]) -> Vec<Shape> {
    let of = |&tokens: &u32| {
        projections
            .iter()
            .map(move |&[in_features, out_features]| Shape {
                tokens,
                in_features,
                out_features,
                rank: RANK,
            })
    };
    tokens.iter().flat_map(of).collect()
}

/// An operation on the layer's tensors.
#[derive(Clone, Copy)]
struct Operation {
    name: &'static str,
    /// Products over `tokens·in·out`, `tokens·in·rank` and `tokens·out·rank`.
    products: [u64; 3],
    /// How often it needs `x` or `dx`, the weight, and `y` or `dy`, each once in either direction.
    tensors: [u64; 3],
    run: Run,
}

#[derive(Clone, Copy)]
enum Run {
    Fused(fn(&mut Fused, &Kernels) -> Result<(), LaunchError>),
    Unfused(fn(&mut Unfused, &Kernels) -> Result<(), LaunchError>),
}

const FORWARD: Operation = Operation {
    name: "lora_linear forward",
    products: [1, 1, 1],
    tensors: [1, 1, 1],
    run: Run::Fused(|layer, kernels| layer.forward(kernels)),
};
const BACKWARD: Operation = Operation {
    name: "lora_linear backward",
    products: [1, 2, 2],
    tensors: [2, 1, 1],
    run: Run::Fused(|layer, kernels| layer.backward(kernels, Wanted::All)),
};
const FORWARD_BACKWARD: Operation = Operation {
    name: "lora_linear forward and backward",
    products: [2, 3, 3],
    tensors: [3, 2, 2],
    run: Run::Fused(|layer, kernels| {
        layer.forward(kernels)?;
        layer.backward(kernels, Wanted::All)
    }),
};
const UNFUSED_FORWARD_BACKWARD: Operation = Operation {
    name: "unfused forward and backward",
    run: Run::Unfused(|layer, kernels| {
        layer.forward(kernels)?;
        layer.backward(kernels)
    }),
    ..FORWARD_BACKWARD
};

const OPERATIONS: [Operation; 10] = [
    Operation {
        name: "frozen product forward",
        products: [1, 0, 0],
        tensors: [1, 1, 1],
        run: Run::Fused(|layer, kernels| layer.frozen_forward(kernels)),
    },
    FORWARD,
    Operation {
        name: "frozen product dx",
        products: [1, 0, 0],
        tensors: [1, 1, 1],
        run: Run::Fused(|layer, kernels| layer.backward(kernels, Wanted::FrozenDx)),
    },
    Operation {
        name: "lora_linear dx, update frozen",
        products: [1, 1, 1],
        tensors: [1, 1, 1],
        run: Run::Fused(|layer, kernels| layer.backward(kernels, Wanted::Dx)),
    },
    Operation {
        name: "lora_linear gradients of the update",
        products: [0, 1, 2],
        tensors: [1, 0, 1],
        run: Run::Fused(|layer, kernels| layer.backward(kernels, Wanted::Gradients)),
    },
    BACKWARD,
    FORWARD_BACKWARD,
    Operation {
        name: "unfused forward",
        run: Run::Unfused(|layer, kernels| layer.forward(kernels)),
        ..FORWARD
    },
    Operation {
        name: "unfused backward",
        run: Run::Unfused(|layer, kernels| layer.backward(kernels)),
        ..BACKWARD
    },
    UNFUSED_FORWARD_BACKWARD,
];

impl Operation {
    fn case(self, shape: Shape, element: Element) -> Case {
        let [tokens, in_features, out_features, rank] = shape.extents();
        let products = [
            in_features * out_features,
            in_features * rank,
            out_features * rank,
        ];
        Case {
            name: self.name,
            shape: vec![
                shape.tokens,
                shape.in_features,
                shape.out_features,
                shape.rank,
            ],
            element,
            bytes: element.size_in_bytes() * dot(shape.elements(), self.tensors),
            flops: 2 * tokens * dot(products, self.products),
            make: Box::new(move |device| self.run.on(device, shape, element)),
        }
    }
}

fn dot(a: [u64; 3], b: [u64; 3]) -> u64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl Run {
    /// A call on new tensors.
    fn on(self, device: &Device, shape: Shape, element: Element) -> Result<Call> {
        Ok(match self {
            Run::Fused(run) => {
                let mut layer = Fused::new(device, shape, element)?;
                Box::new(move |kernels| run(&mut layer, kernels))
            }
            Run::Unfused(run) => {
                let mut layer = Unfused::new(device, shape, element)?;
                Box::new(move |kernels| run(&mut layer, kernels))
            }
        })
    }
}
