use super::Shape;
use super::fused::{Fused, Wanted};
use crate::device::{Buffer, Device};
use anyhow::Result;
use fuselora_kernels::abi::MatmulShape;
use fuselora_kernels::elementwise::{add_assign, cast, scale};
use fuselora_kernels::matmul::{Layout, matmul};
use fuselora_kernels::{Element, Kernels, LaunchError};

/// The same layer operation by operation, in PEFT's order: `x·Wᵀ`, `x·Aᵀ`, `h·Bᵀ`, scale, add, and backward what
/// autograd makes of it. With activations of 16 bits the update is computed in f32 on casts of them, as PEFT
/// does with its f32 adapters; it is rounded before it is added, which moves less than PEFT's sum in f32 and
/// the cast of that.
pub struct Unfused {
    shape: Shape,
    /// `x`, `y`, their gradients, and the frozen product.
    layer: Fused,
    narrow: Option<Narrow>,
    a: Buffer,
    b: Buffer,
    da: Buffer,
    db: Buffer,
    /// `x·Aᵀ`
    h: Buffer,
    dh: Buffer,
    /// `h·Bᵀ [tokens, out]`; in the backward pass its gradient.
    update: Buffer,
    /// `dh·A [tokens, in]`
    dx: Buffer,
}

/// What activations of 16 bits need besides.
struct Narrow {
    /// `x` in f32.
    x: Buffer,
    /// The update in the activations' type.
    update: Buffer,
    /// The update's part of `dx` in the activations' type.
    dx: Buffer,
}

/// It is applied, and leaves the numbers as they are from one run to the next.
const SCALING: f32 = 1.0;

impl Unfused {
    /// Random tensors; activations and the weight are stored as `element`.
    pub fn new(device: &Device, shape: Shape, element: Element) -> Result<Unfused> {
        let [tokens, in_features, out_features, rank] = shape.extents();
        let [x, _, y] = shape.elements();
        let random = |len| device.random(Element::F32, len);
        let narrow = match element {
            Element::F32 => None,
            _ => Some(Narrow {
                x: random(x)?,
                update: device.empty(element, y)?,
                dx: device.empty(element, x)?,
            }),
        };
        Ok(Unfused {
            shape,
            layer: Fused::new(device, shape, element)?,
            narrow,
            a: random(rank * in_features)?,
            b: random(out_features * rank)?,
            da: random(rank * in_features)?,
            db: random(out_features * rank)?,
            h: random(tokens * rank)?,
            dh: random(tokens * rank)?,
            update: random(y)?,
            dx: random(x)?,
        })
    }

    /// `y = x·Wᵀ + scaling·(x·Aᵀ)·Bᵀ`
    pub fn forward(&mut self, kernels: &Kernels) -> Result<(), LaunchError> {
        let Shape {
            tokens,
            in_features,
            out_features,
            rank,
        } = self.shape;
        let layer = &mut self.layer;
        layer.frozen_forward(kernels)?;
        if let Some(narrow) = &mut self.narrow {
            cast(kernels, layer.x.operand(), narrow.x.operand_mut())?;
        }
        let x = self.narrow.as_ref().map_or(&layer.x, |narrow| &narrow.x);
        product(
            kernels,
            Layout::Nt,
            [tokens, rank, in_features],
            [x, &self.a],
            &mut self.h,
        )?;
        product(
            kernels,
            Layout::Nt,
            [tokens, out_features, rank],
            [&self.h, &self.b],
            &mut self.update,
        )?;
        scale(kernels, self.update.operand_mut(), SCALING)?;
        let update = match &mut self.narrow {
            None => &self.update,
            Some(narrow) => {
                cast(kernels, self.update.operand(), narrow.update.operand_mut())?;
                &narrow.update
            }
        };
        add_assign(kernels, update.operand(), layer.y.operand_mut())
    }

    /// `dx`, `da` and `db`.
    pub fn backward(&mut self, kernels: &Kernels) -> Result<(), LaunchError> {
        let Shape {
            tokens,
            in_features,
            out_features,
            rank,
        } = self.shape;
        let layer = &mut self.layer;
        layer.backward(kernels, Wanted::FrozenDx)?;
        let dy = match &self.narrow {
            None => &mut layer.dy,
            Some(_) => {
                cast(kernels, layer.dy.operand(), self.update.operand_mut())?;
                &mut self.update
            }
        };
        scale(kernels, dy.operand_mut(), SCALING)?;
        product(
            kernels,
            Layout::Tn,
            [out_features, rank, tokens],
            [dy, &self.h],
            &mut self.db,
        )?;
        product(
            kernels,
            Layout::Nn,
            [tokens, rank, out_features],
            [dy, &self.b],
            &mut self.dh,
        )?;
        let x = self.narrow.as_ref().map_or(&layer.x, |narrow| &narrow.x);
        product(
            kernels,
            Layout::Tn,
            [rank, in_features, tokens],
            [&self.dh, x],
            &mut self.da,
        )?;
        product(
            kernels,
            Layout::Nn,
            [tokens, in_features, rank],
            [&self.dh, &self.a],
            &mut self.dx,
        )?;
        let dx = match &mut self.narrow {
            None => &self.dx,
            Some(narrow) => {
                cast(kernels, self.dx.operand(), narrow.dx.operand_mut())?;
                &narrow.dx
            }
        };
        add_assign(kernels, dx.operand(), layer.dx.operand_mut())
    }
}

/// `c [m, n]`, the product of two f32 matrices over `k`.
fn product(
    kernels: &Kernels,
    layout: Layout,
    [m, n, k]: [u32; 3],
    [a, b]: [&Buffer; 2],
    c: &mut Buffer,
) -> Result<(), LaunchError> {
    let shape = MatmulShape { m, n, k };
    matmul(
        kernels,
        layout,
        shape,
        a.operand(),
        b.operand(),
        c.operand_mut(),
    )
}
