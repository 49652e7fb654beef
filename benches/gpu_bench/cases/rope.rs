//! Rotary positions. Shapes are `[tokens, heads, head_dim]`.

use crate::case::{Case, Scope};
use fuselora_kernels::Element;
use fuselora_kernels::abi::RopeShape;
use fuselora_kernels::rope::rope;

pub fn cases(scope: Scope) -> Vec<Case> {
    let shape: [u32; 3] = match scope {
        Scope::Tiny => [9, 3, 16],
        Scope::Quick | Scope::Full => [16384, 32, 128],
    };
    scope
        .storage()
        .iter()
        .map(|&element| case(shape, element))
        .collect()
}

fn case(shape: [u32; 3], element: Element) -> Case {
    let [tokens, heads, head_dim] = shape;
    let elements = shape
        .iter()
        .map(|&extent| u64::from(extent))
        .product::<u64>();
    let half = head_dim / 2;
    // Sequences of this many tokens.
    let table_rows = tokens.min(1024);
    Case {
        name: "rope",
        shape: shape.to_vec(),
        element,
        bytes: 2 * elements * element.size_in_bytes(),
        flops: 0,
        make: Box::new(move |device| {
            let mut x = device.random(element, elements)?;
            let table = || device.random(Element::F32, u64::from(table_rows) * u64::from(half));
            let (cos, sin) = (table()?, table()?);
            let positions: Vec<u32> = (0..tokens).map(|token| token % table_rows).collect();
            let positions = device.indices(&positions)?;
            let shape = RopeShape {
                heads,
                head_dim,
                half,
                table_rows,
                direction: 1.0,
            };
            Ok(Box::new(move |kernels| {
                let (cos, sin) = (cos.operand(), sin.operand());
                rope(
                    kernels,
                    shape,
                    x.operand_mut(),
                    positions.operand(),
                    cos,
                    sin,
                )
            }))
        }),
    }
}
