//! Causal attention. Shapes are `[sequences, seqlen, heads, kv_heads, head_dim]`.

use crate::case::{Case, STORAGE, Scope};
use crate::device::{Buffer, Device};
use anyhow::Result;
use fuselora_kernels::attention::{Attention, Gradients, Rows, Saved, backward, forward};
use fuselora_kernels::{Element, Kernels, LaunchError};

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
    cases
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
