//! Dequantizing an NF4 weight. Shapes are `[out_features, in_features]`.

use crate::case::{Case, Scope};
use crate::timing::Call;
use fuselora_kernels::Element;
use fuselora_kernels::nf4::{Absmax, Weight, dequantize};

const BLOCK_SIZE: u64 = 64;
/// Absmax values that share one of the second level.
const NESTED_BLOCK_SIZE: u64 = 256;

pub fn cases(scope: Scope) -> Vec<Case> {
    let shapes: &[[u32; 2]] = match scope {
        Scope::Tiny => &[[64, 64]],
        Scope::Quick => &[[4096, 4096]],
        Scope::Full => &[[4096, 4096], [14336, 4096]],
    };
    let mut cases = Vec::new();
    for &shape in shapes {
        for element in [Element::Bf16, Element::F32] {
            cases.extend([false, true].map(|nested| case(shape, element, nested)));
        }
    }
    cases
}

fn case(shape: [u32; 2], element: Element, nested: bool) -> Case {
    let elements = shape
        .iter()
        .map(|&extent| u64::from(extent))
        .product::<u64>();
    let blocks = elements.div_ceil(BLOCK_SIZE);
    let outer = blocks.div_ceil(NESTED_BLOCK_SIZE);
    let (name, statistics) = match nested {
        false => ("nf4 dequantize", 4 * blocks),
        true => ("nf4 dequantize, nested", blocks + 4 * outer),
    };
    Case {
        name,
        shape: shape.to_vec(),
        element,
        bytes: elements / 2 + statistics + element.size_in_bytes() * elements,
        flops: 0,
        make: Box::new(move |device| {
            let packed = device.random(Element::U8, elements.div_ceil(2))?;
            let absmax = match nested {
                false => device.random(Element::F32, blocks)?,
                true => device.random(Element::U8, blocks)?,
            };
            let quant_map = device.random(Element::F32, 256)?;
            let nested_absmax = device.random(Element::F32, outer)?;
            let mut out = device.empty(element, elements)?;
            let call: Call = Box::new(move |kernels| {
                let absmax = match nested {
                    false => Absmax::Plain(absmax.operand()),
                    true => Absmax::Nested {
                        absmax: absmax.operand(),
                        nested_quant_map: quant_map.operand(),
                        nested_absmax: nested_absmax.operand(),
                        offset: 0.0,
                    },
                };
                let weight = Weight {
                    elements,
                    block_size: BLOCK_SIZE as u32,
                    packed: packed.operand(),
                    absmax,
                };
                dequantize(kernels, &weight, 0, out.operand_mut())
            });
            Ok(call)
        }),
    }
}
