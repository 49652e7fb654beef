//! Causal attention, and the matrix products alone that it is made of. Shapes are `[sequences, seqlen, heads, kv_heads, head_dim]`.

use crate::case::{Case, STORAGE, Scope};
use crate::device::{Buffer, Device};
use anyhow::Result;
use fuselora_kernels::abi::MatmulShape;
use fuselora_kernels::attention::{Attention, Gradients, Rows, Saved, backward, forward};
use fuselora_kernels::matmul::{Layout, matmul};
use fuselora_kernels::{Element, Kernels, LaunchError, Operand, OperandMut};

/// Llama 3.2 1B and 3.1 8B, 4096 tokens each.
const MAIN: [[u32; 5]; 3] = [
    [4, 1024, 32, 8, 64],
    [2, 2048, 32, 8, 64],
    [1, 4096, 32, 8, 128],
];

pub fn cases(scope: Scope) -> Vec<Case> {
    let shapes: &[[u32; 5]] = match scope {
        Scope::Tiny => &[[2, 40, 4, 2, 64]],
        Scope::Quick => &MAIN[..1],
        Scope::Full => &MAIN,
    };
    let mut cases = Vec::new();
    for element in STORAGE {
        for &shape in shapes {
            cases.extend([true, false].map(|is_forward| case(shape, element, is_forward)));
        }
    }
    for &shape in shapes {
        cases.extend([true, false].map(|is_forward| products_case(shape, BF16, is_forward)));
    }
    cases
}

const BF16: Element = Element::Bf16;

/// In one kernel, and the products of an attention that stores its scores, forward or backward.
pub fn compared(shape: [u32; 5], element: Element, is_forward: bool) -> [Case; 2] {
    [case, products_case].map(|case| case(shape, element, is_forward))
}

fn case(shape: [u32; 5], element: Element, is_forward: bool) -> Case {
    let [sequences, seqlen, heads, kv_heads, head_dim] = shape.map(u64::from);
    let rows = sequences * seqlen * head_dim;
    let (q, kv) = (rows * heads, rows * kv_heads);
    // Two products forward and five backward, over the half of the scores that causality leaves.
    let product = 2 * sequences * heads * head_dim * seqlen * (seqlen + 1) / 2;
    let (name, tensors, products) = match is_forward {
        true => ("attention forward", 2 * q + 2 * kv, 2),
        false => ("attention backward", 4 * q + 4 * kv, 5),
    };
    Case {
        name,
        shape: shape.to_vec(),
        element,
        bytes: element.size_in_bytes() * tensors,
        flops: products * product,
        make: Box::new(move |device| {
            let mut tensors = Tensors::new(device, shape, element)?;
            if is_forward {
                return Ok(Box::new(move |kernels: &Kernels| tensors.forward(kernels)));
            }
            // Its output and statistics belong to the backward pass.
            tensors.forward(&device.kernels)?;
            Ok(Box::new(move |kernels| tensors.backward(kernels)))
        }),
    }
}

struct Tensors {
    shape: [u32; 5],
    cu_seqlens: Buffer,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    o: Buffer,
    lse: Buffer,
    partial: Buffer,
    d_o: Buffer,
    dq: Buffer,
    dk: Buffer,
    dv: Buffer,
    statistics: Buffer,
}

impl Tensors {
    fn new(device: &Device, shape: [u32; 5], element: Element) -> Result<Tensors> {
        let [sequences, seqlen, heads, kv_heads, head_dim] = shape;
        let rows = u64::from(sequences) * u64::from(seqlen) * u64::from(head_dim);
        let (q, kv) = (rows * u64::from(heads), rows * u64::from(kv_heads));
        let boundaries: Vec<u32> = (0..=sequences).map(|i| i * seqlen).collect();
        let cu_seqlens = device.indices(&boundaries)?;
        let attention = attention(shape, &cu_seqlens);
        let (partial, statistics) = (attention.partial_len(), attention.statistics_len());
        Ok(Tensors {
            shape,
            q: device.random(element, q)?,
            k: device.random(element, kv)?,
            v: device.random(element, kv)?,
            o: device.empty(element, q)?,
            lse: device.empty(Element::F32, q / u64::from(head_dim))?,
            partial: device.empty(Element::F32, partial)?,
            d_o: device.random(element, q)?,
            dq: device.empty(element, q)?,
            dk: device.empty(element, kv)?,
            dv: device.empty(element, kv)?,
            statistics: device.empty(Element::F32, statistics)?,
            cu_seqlens,
        })
    }

    fn forward(&mut self, kernels: &Kernels) -> Result<(), LaunchError> {
        forward(
            kernels,
            &attention(self.shape, &self.cu_seqlens),
            self.q.operand(),
            self.k.operand(),
            self.v.operand(),
            self.o.operand_mut(),
            self.lse.operand_mut(),
            self.partial.operand_mut(),
        )
    }

    fn backward(&mut self, kernels: &Kernels) -> Result<(), LaunchError> {
        let saved = Saved {
            d_o: self.d_o.operand(),
            q: self.q.operand(),
            k: self.k.operand(),
            v: self.v.operand(),
            o: self.o.operand(),
            lse: self.lse.operand(),
        };
        let gradients = Gradients {
            dq: self.dq.operand_mut(),
            dk: self.dk.operand_mut(),
            dv: self.dv.operand_mut(),
        };
        backward(
            kernels,
            &attention(self.shape, &self.cu_seqlens),
            &saved,
            self.statistics.operand_mut(),
            gradients,
        )
    }
}

fn attention(shape: [u32; 5], cu_seqlens: &Buffer) -> Attention<'_> {
    let [sequences, seqlen, heads, kv_heads, head_dim] = shape;
    let rows = Rows {
        cu_seqlens: cu_seqlens.operand(),
        total: sequences * seqlen,
        max_len: seqlen,
    };
    Attention {
        heads,
        kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        window: None,
        q_rows: rows,
        kv_rows: rows,
    }
}

/// The products of an attention that stores its scores, without masks, softmax, or the sums over a group's heads: less
/// than it takes. All heads are one product, of as many operations and scores as theirs.
fn products_case(shape: [u32; 5], element: Element, is_forward: bool) -> Case {
    let [sequences, seqlen, heads, _, head_dim] = shape;
    let rows = sequences * seqlen * heads;
    let [q, k, scores] = [[rows, head_dim], [seqlen, head_dim], [rows, seqlen]]
        .map(|[a, b]| u64::from(a) * u64::from(b));
    // Forward q·kᵀ and p·v; backward do·vᵀ, and of the shape of p·v, dv, dq and dk.
    let (name, to_results) = match is_forward {
        true => ("attention forward's products alone", 1),
        false => ("attention backward's products alone", 3),
    };
    Case {
        name,
        shape: shape.to_vec(),
        element,
        bytes: element.size_in_bytes() * (1 + to_results) * (q + k + scores),
        flops: (1 + to_results) * 2 * scores * u64::from(head_dim),
        make: Box::new(move |device| {
            let (left, right) = (device.random(element, q)?, device.random(element, k)?);
            let mut weights = device.empty(element, scores)?;
            let mut results = device.empty(element, q)?;
            let to_scores = [rows, seqlen, head_dim];
            Ok(Box::new(move |kernels| {
                let (left, right) = (left.operand(), right.operand());
                product(
                    kernels,
                    Layout::Nt,
                    to_scores,
                    [left, right],
                    weights.operand_mut(),
                )?;
                for _ in 0..to_results {
                    let factors = [weights.operand(), right];
                    let shape = [rows, head_dim, seqlen];
                    product(kernels, Layout::Nn, shape, factors, results.operand_mut())?;
                }
                Ok(())
            }))
        }),
    }
}

fn product(
    kernels: &Kernels,
    layout: Layout,
    [m, n, k]: [u32; 3],
    [a, b]: [Operand; 2],
    c: OperandMut,
) -> Result<(), LaunchError> {
    matmul(kernels, layout, MatmulShape { m, n, k }, a, b, c)
}
