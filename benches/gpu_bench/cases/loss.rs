//! Cross-entropy. Shapes are `[tokens, vocab]`.

use crate::case::{Case, Scope};
use fuselora_kernels::Element;
use fuselora_kernels::loss::{cross_entropy_backward, cross_entropy_forward};

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
    cases
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
