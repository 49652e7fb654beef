//! NF4 weights. Shapes are `[out_features, in_features]`, with the tokens before them for products.

use crate::case::{Case, Scope};
use crate::device::{Buffer, Call, Device};
use anyhow::Result;
use fuselora_kernels::lora_linear::{self, Output, Projection, forward};
use fuselora_kernels::nf4::{Absmax, Weight, dequantize, quantize};
use fuselora_kernels::{Element, Kernels, LaunchError};

const BLOCK_SIZE: u64 = 64;
/// Tokens that the kernels for generation take at most.
const GEMV_TOKENS: u32 = 8;
/// Absmax values that share one of the second level.
const NESTED_BLOCK_SIZE: u64 = 256;

pub fn cases(scope: Scope) -> Vec<Case> {
    let (shapes, tokens): (&[[u32; 2]], &[u32]) = match scope {
        Scope::Tiny => (&[[64, 64]], &[1, 9]),
        Scope::Quick => (&[[4096, 4096], [14336, 4096]], &[1, 512]),
        Scope::Full => (&[[4096, 4096], [14336, 4096]], &[1, 4, 8, 128, 512, 2048]),
    };
    let mut cases = Vec::new();
    for &shape in shapes {
        for element in [Element::Bf16, Element::F32] {
            for nested in [false, true] {
                cases.push(dequantize_case(shape, element, nested));
                if element == Element::Bf16 {
                    let many = tokens.iter().filter(|&&tokens| tokens > GEMV_TOKENS);
                    cases.extend(many.map(|&t| dequantized_case(t, shape, element, nested)));
                }
                cases.extend(
                    tokens
                        .iter()
                        .map(|&t| product_case(t, shape, element, nested)),
                );
            }
            cases.push(quantize_case(shape, element));
        }
        let dequantized = |&t: &u32| dequantized_product_case(t, shape, Element::Bf16);
        cases.extend(tokens.iter().map(dequantized));
    }
    cases
}

fn dequantize_case(shape: [u32; 2], element: Element, nested: bool) -> Case {
    let size = Size::of(shape);
    Case {
        name: ["nf4 dequantize", "nf4 dequantize, nested"][usize::from(nested)],
        shape: shape.to_vec(),
        element,
        bytes: size.bytes(nested) + element.size_in_bytes() * size.elements,
        flops: 0,
        make: Box::new(move |device| {
            let weight = Buffers::new(device, size, nested)?;
            let mut out = device.empty(element, size.elements)?;
            let call: Call = Box::new(move |kernels| {
                dequantize(kernels, &weight.weight(), 0, out.operand_mut())
            });
            Ok(call)
        }),
    }
}

/// What the product is compared with: the whole weight dequantized first.
fn dequantized_case(tokens: u32, shape: [u32; 2], element: Element, nested: bool) -> Case {
    let (size, [out_features, in_features]) = (Size::of(shape), shape);
    let [x_len, y_len] = [in_features, out_features].map(|n| u64::from(tokens) * u64::from(n));
    Case {
        name: [
            "nf4 dequantize, then product",
            "nf4 dequantize, nested, then product",
        ][usize::from(nested)],
        shape: vec![tokens, out_features, in_features],
        element,
        bytes: size.bytes(nested) + element.size_in_bytes() * (2 * size.elements + x_len + y_len),
        flops: 2 * u64::from(tokens) * size.elements,
        make: Box::new(move |device| {
            let weight = Buffers::new(device, size, nested)?;
            let mut dense = device.empty(element, size.elements)?;
            let x = device.random(element, x_len)?;
            let mut y = device.empty(element, y_len)?;
            let mut workspace = device.empty(Element::F32, 1)?;
            let call: Call = Box::new(move |kernels| {
                dequantize(kernels, &weight.weight(), 0, dense.operand_mut())?;
                let projection = Projection {
                    weight: lora_linear::Weight::Dense(dense.operand()),
                    bias: None,
                    out_features,
                    lora: None,
                };
                let output = Output {
                    y: y.operand_mut(),
                    h: None,
                };
                forward(
                    kernels,
                    tokens,
                    in_features,
                    x.operand(),
                    &[projection],
                    &[output],
                    workspace.operand_mut(),
                )
            });
            Ok(call)
        }),
    }
}

fn quantize_case(shape: [u32; 2], element: Element) -> Case {
    let size = Size::of(shape);
    Case {
        name: "nf4 quantize",
        shape: shape.to_vec(),
        element,
        bytes: size.bytes(false) + element.size_in_bytes() * size.elements,
        flops: 0,
        make: Box::new(move |device| {
            let x = device.random(element, size.elements)?;
            let mut packed = device.empty(Element::U8, size.elements.div_ceil(2))?;
            let mut absmax = device.empty(Element::F32, size.blocks)?;
            let call: Call = Box::new(move |kernels| {
                let (packed, absmax) = (packed.operand_mut(), absmax.operand_mut());
                quantize(kernels, x.operand(), BLOCK_SIZE as u32, packed, absmax)
            });
            Ok(call)
        }),
    }
}

/// The frozen product alone, as generation and a forward pass have it.
fn product_case(tokens: u32, shape: [u32; 2], element: Element, nested: bool) -> Case {
    let size = Size::of(shape);
    Case {
        name: ["nf4 product", "nf4 product, nested"][usize::from(nested)],
        shape: vec![tokens, shape[0], shape[1]],
        element,
        bytes: size.bytes(nested) + activations(tokens, shape, element),
        flops: 2 * u64::from(tokens) * size.elements,
        make: Box::new(move |device| {
            let weight = Buffers::new(device, size, nested)?;
            let mut product = Product::new(device, tokens, shape, element)?;
            let call: Call = Box::new(move |kernels| {
                product.run(kernels, lora_linear::Weight::Nf4(weight.weight()))
            });
            Ok(call)
        }),
    }
}

/// The same with the weight dequantized first.
fn dequantized_product_case(tokens: u32, shape: [u32; 2], element: Element) -> Case {
    let size = Size::of(shape);
    let dequantized = element.size_in_bytes() * size.elements;
    Case {
        name: "nf4 dequantize, product",
        shape: vec![tokens, shape[0], shape[1]],
        element,
        bytes: size.bytes(false) + 2 * dequantized + activations(tokens, shape, element),
        flops: 2 * u64::from(tokens) * size.elements,
        make: Box::new(move |device| {
            let weight = Buffers::new(device, size, false)?;
            let mut dense = device.empty(element, size.elements)?;
            let mut product = Product::new(device, tokens, shape, element)?;
            let call: Call = Box::new(move |kernels| {
                dequantize(kernels, &weight.weight(), 0, dense.operand_mut())?;
                product.run(kernels, lora_linear::Weight::Dense(dense.operand()))
            });
            Ok(call)
        }),
    }
}

/// A weight dequantized tile by tile within the product, and before it.
pub fn compared(tokens: u32, shape: [u32; 2], element: Element) -> [Case; 2] {
    [
        product_case(tokens, shape, element, false),
        dequantized_product_case(tokens, shape, element),
    ]
}

/// Bytes of `x` and `y`.
fn activations(tokens: u32, shape: [u32; 2], element: Element) -> u64 {
    let features = u64::from(shape[0]) + u64::from(shape[1]);
    element.size_in_bytes() * u64::from(tokens) * features
}

/// What a frozen product reads and writes besides its weight.
struct Product {
    tokens: u32,
    out_features: u32,
    in_features: u32,
    x: Buffer,
    y: Buffer,
    workspace: Buffer,
}

impl Product {
    fn new(device: &Device, tokens: u32, shape: [u32; 2], element: Element) -> Result<Product> {
        let [out_features, in_features] = shape;
        let elements = |features: u32| u64::from(tokens) * u64::from(features);
        Ok(Product {
            tokens,
            out_features,
            in_features,
            x: device.random(element, elements(in_features))?,
            y: device.empty(element, elements(out_features))?,
            workspace: device.empty(Element::F32, 1)?,
        })
    }

    fn run(&mut self, kernels: &Kernels, weight: lora_linear::Weight) -> Result<(), LaunchError> {
        let projection = Projection {
            weight,
            bias: None,
            out_features: self.out_features,
            lora: None,
        };
        let output = Output {
            y: self.y.operand_mut(),
            h: None,
        };
        forward(
            kernels,
            self.tokens,
            self.in_features,
            self.x.operand(),
            &[projection],
            &[output],
            self.workspace.operand_mut(),
        )
    }
}

/// How much a weight holds.
#[derive(Clone, Copy)]
struct Size {
    elements: u64,
    blocks: u64,
    nested_blocks: u64,
}

impl Size {
    fn of([out_features, in_features]: [u32; 2]) -> Size {
        let elements = u64::from(out_features) * u64::from(in_features);
        let blocks = elements.div_ceil(BLOCK_SIZE);
        Size {
            elements,
            blocks,
            nested_blocks: blocks.div_ceil(NESTED_BLOCK_SIZE),
        }
    }

    /// Codes and statistics.
    fn bytes(&self, nested: bool) -> u64 {
        self.elements / 2
            + match nested {
                false => 4 * self.blocks,
                true => self.blocks + 4 * self.nested_blocks,
            }
    }
}

/// A quantized weight.
struct Buffers {
    size: Size,
    nested: bool,
    packed: Buffer,
    absmax: Buffer,
    nested_quant_map: Buffer,
    nested_absmax: Buffer,
}

impl Buffers {
    fn new(device: &Device, size: Size, nested: bool) -> Result<Buffers> {
        let absmax = if nested { Element::U8 } else { Element::F32 };
        Ok(Buffers {
            size,
            nested,
            packed: device.random(Element::U8, size.elements.div_ceil(2))?,
            absmax: device.random(absmax, size.blocks)?,
            nested_quant_map: device.random(Element::F32, 256)?,
            nested_absmax: device.random(Element::F32, size.nested_blocks)?,
        })
    }

    fn weight(&self) -> Weight<'_> {
        Weight {
            elements: self.size.elements,
            block_size: BLOCK_SIZE as u32,
            packed: self.packed.operand(),
            absmax: match self.nested {
                false => Absmax::Plain(self.absmax.operand()),
                true => Absmax::Nested {
                    absmax: self.absmax.operand(),
                    nested_quant_map: self.nested_quant_map.operand(),
                    nested_absmax: self.nested_absmax.operand(),
                    offset: 0.0,
                },
            },
        }
    }
}
