//! Cross-entropy. Shapes are `[tokens, vocab]`, and `[tokens, vocab, in_features]` with the head before it.

use crate::case::{Case, Scope};
use crate::device::{Buffer, Device};
use anyhow::Result;
use fuselora_kernels::lora_linear::{self, Backward, Output, Projection, Weight};
use fuselora_kernels::loss::{cross_entropy_backward, cross_entropy_forward};
use fuselora_kernels::{Element, Kernels, LaunchError};

/// Targets whose logits exist at once, as in training on a GPU.
pub const TARGETS_PER_CHUNK: u32 = 2048;

pub fn cases(scope: Scope) -> Vec<Case> {
    let shape: [u32; 2] = match scope {
        Scope::Tiny => [3, 500],
        // Llama 3's vocabulary.
        Scope::Quick | Scope::Full => [1024, 128_256],
    };
    let mut cases = Vec::new();
    for &element in scope.storage() {
        cases.extend([true, false].map(|is_forward| case(shape, element, is_forward)));
    }
    let (head, per_chunk) = match scope {
        Scope::Tiny => ([20, 72, 64], 16),
        Scope::Quick | Scope::Full => ([2 * TARGETS_PER_CHUNK, shape[1], 2048], TARGETS_PER_CHUNK),
    };
    cases.extend(compared(head, per_chunk, Element::Bf16));
    cases
}

/// The head, the loss and their backward pass: in chunks of targets, and with all logits at once, the loss apart from
/// its gradient.
pub fn compared(shape: [u32; 3], per_chunk: u32, element: Element) -> [Case; 2] {
    let case = |name, run: fn(&mut Head, &Kernels) -> Result<(), LaunchError>| {
        let [tokens, vocab, in_features] = shape.map(u64::from);
        let (x, weight, logits) = (tokens * in_features, vocab * in_features, tokens * vocab);
        Case {
            name,
            shape: shape.to_vec(),
            element,
            bytes: element.size_in_bytes() * (2 * x + 2 * weight + 2 * logits),
            flops: 2 * 2 * tokens * weight,
            make: Box::new(move |device| {
                let mut head = Head::new(device, shape, per_chunk, element)?;
                Ok(Box::new(move |kernels| run(&mut head, kernels)))
            }),
        }
    };
    [
        case("linear cross_entropy", Head::in_chunks),
        case("linear cross_entropy, all logits at once", Head::at_once),
    ]
}

fn case(shape: [u32; 2], element: Element, is_forward: bool) -> Case {
    let [tokens, vocab] = shape;
    let elements = u64::from(tokens) * u64::from(vocab);
    let (name, accesses) = match is_forward {
        true => ("cross_entropy forward", 1),
        false => ("cross_entropy forward and backward", 2),
    };
    Case {
        name,
        shape: shape.to_vec(),
        element,
        bytes: accesses * elements * element.size_in_bytes(),
        flops: 0,
        make: Box::new(move |device| {
            let mut logits = device.random(element, elements)?;
            let targets: Vec<u32> = (0..tokens).map(|token| 37 * token % vocab).collect();
            let targets = device.indices(&targets)?;
            let mut losses = device.empty(Element::F32, tokens.into())?;
            let scale = device.random(Element::F32, 1)?;
            let mut total = device.empty(Element::F32, 1)?;
            Ok(Box::new(move |kernels| {
                let targets = targets.operand();
                let (losses, total) = (losses.operand_mut(), total.operand_mut());
                if is_forward {
                    let logits = logits.operand();
                    return cross_entropy_forward(kernels, vocab, logits, targets, losses, total);
                }
                let (logits, scale) = (logits.operand_mut(), scale.operand());
                cross_entropy_backward(kernels, vocab, logits, targets, scale, losses, total)
            }))
        }),
    }
}

/// The tensors of a head and its loss.
struct Head {
    tokens: u32,
    vocab: u32,
    in_features: u32,
    per_chunk: u32,
    x: Buffer,
    weight: Buffer,
    logits: Buffer,
    targets: Buffer,
    losses: Buffer,
    scale: Buffer,
    total: Buffer,
    dx: Buffer,
    workspace: Buffer,
}

impl Head {
    fn new(device: &Device, shape: [u32; 3], per_chunk: u32, element: Element) -> Result<Head> {
        let [tokens, vocab, in_features] = shape;
        let elements = |[a, b]: [u32; 2]| u64::from(a) * u64::from(b);
        let targets: Vec<u32> = (0..tokens).map(|token| 37 * token % vocab).collect();
        Ok(Head {
            tokens,
            vocab,
            in_features,
            per_chunk,
            x: device.random(element, elements([tokens, in_features]))?,
            weight: device.random(element, elements([vocab, in_features]))?,
            logits: device.empty(element, elements([tokens, vocab]))?,
            targets: device.indices(&targets)?,
            losses: device.empty(Element::F32, tokens.into())?,
            scale: device.random(Element::F32, 1)?,
            total: device.empty(Element::F32, 1)?,
            dx: device.empty(element, elements([tokens, in_features]))?,
            workspace: device.empty(Element::F32, 1)?,
        })
    }

    fn in_chunks(&mut self, kernels: &Kernels) -> Result<(), LaunchError> {
        for first in (0..self.tokens).step_by(self.per_chunk as usize) {
            let count = self.per_chunk.min(self.tokens - first);
            self.forward(kernels, first, count)?;
            self.backward(kernels, first, count)?;
        }
        Ok(())
    }

    fn at_once(&mut self, kernels: &Kernels) -> Result<(), LaunchError> {
        self.forward(kernels, 0, self.tokens)?;
        cross_entropy_forward(
            kernels,
            self.vocab,
            self.logits.operand(),
            self.targets.operand(),
            self.losses.operand_mut(),
            self.total.operand_mut(),
        )?;
        self.backward(kernels, 0, self.tokens)
    }

    /// The logits of `count` tokens, at the start of their tensor.
    fn forward(&mut self, kernels: &Kernels, first: u32, count: u32) -> Result<(), LaunchError> {
        let output = Output {
            y: self.logits.rows_mut(0, count, self.vocab),
            h: None,
        };
        lora_linear::forward(
            kernels,
            count,
            self.in_features,
            self.x.rows(first, count, self.in_features),
            &[head(&self.weight, self.vocab)],
            &[output],
            self.workspace.operand_mut(),
        )
    }

    /// Their loss and its gradient, and the gradient of `x`.
    fn backward(&mut self, kernels: &Kernels, first: u32, count: u32) -> Result<(), LaunchError> {
        cross_entropy_backward(
            kernels,
            self.vocab,
            self.logits.rows_mut(0, count, self.vocab),
            self.targets.rows(first, count, 1),
            self.scale.operand(),
            self.losses.rows_mut(first, count, 1),
            self.total.operand_mut(),
        )?;
        let item = Backward {
            projection: head(&self.weight, self.vocab),
            dy: self.logits.rows(0, count, self.vocab),
            h: None,
            gradients: None,
        };
        lora_linear::backward(
            kernels,
            count,
            self.in_features,
            self.x.rows(first, count, self.in_features),
            &[item],
            Some(self.dx.rows_mut(first, count, self.in_features)),
            self.workspace.operand_mut(),
        )
    }
}

fn head(weight: &Buffer, vocab: u32) -> Projection<'_> {
    Projection {
        weight: Weight::Dense(weight.operand()),
        bias: None,
        out_features: vocab,
        lora: None,
    }
}
