use super::Shape;
use crate::device::{Buffer, Device};
use anyhow::Result;
use fuselora_kernels::lora_linear::{
    Backward, Gradients, Lora, Output, Projection, backward, backward_workspace, forward,
    forward_workspace,
};
use fuselora_kernels::{Element, Kernels, LaunchError};

/// The tensors of a layer that `lora_linear` computes.
pub struct Fused {
    shape: Shape,
    pub(super) x: Buffer,
    weight: Buffer,
    a: Buffer,
    b: Buffer,
    pub(super) y: Buffer,
    h: Buffer,
    pub(super) dy: Buffer,
    pub(super) dx: Buffer,
    da: Buffer,
    db: Buffer,
    workspace: Buffer,
}

/// What a backward pass is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// `dx`, and the gradients of the update.
    All,
    /// `dx`, of a layer whose update is frozen.
    Dx,
    /// The gradients of the update, as in the lowest layer.
    Gradients,
    /// `dx` of the frozen product alone.
    FrozenDx,
}

impl Fused {
    /// Random tensors; activations and the weight are stored as `element`.
    pub fn new(device: &Device, shape: Shape, element: Element) -> Result<Fused> {
        let [tokens, in_features, out_features, rank] = shape.extents();
        let [x, weight, y] = shape.elements();
        let mut layer = Fused {
            shape,
            x: device.random(element, x)?,
            weight: device.random(element, weight)?,
            a: device.random(Element::F32, rank * in_features)?,
            b: device.random(Element::F32, out_features * rank)?,
            y: device.empty(element, y)?,
            h: device.random(Element::F32, tokens * rank)?,
            dy: device.random(element, y)?,
            dx: device.empty(element, x)?,
            da: device.empty(Element::F32, rank * in_features)?,
            db: device.empty(Element::F32, out_features * rank)?,
            workspace: device.empty(Element::F32, 0)?,
        };
        let (forward, backward) = layer.workspace();
        layer.workspace = device.empty(Element::F32, forward.max(backward))?;
        Ok(layer)
    }

    /// The f32 elements that forward and backward use between their launches.
    pub fn workspace(&mut self) -> (u64, u64) {
        let Shape {
            tokens,
            in_features,
            ..
        } = self.shape;
        let projection = projection(self.shape, &self.weight, Some((&self.a, &self.b)));
        let item = Backward {
            projection,
            dy: self.dy.operand(),
            h: Some(self.h.operand()),
            gradients: Some(Gradients {
                a: self.da.operand_mut(),
                b: self.db.operand_mut(),
            }),
        };
        (
            forward_workspace(tokens, in_features, &[projection]),
            backward_workspace(tokens, in_features, &[item]),
        )
    }

    /// `y`, and `h` for the backward pass.
    pub fn forward(&mut self, kernels: &Kernels) -> Result<(), LaunchError> {
        let projection = projection(self.shape, &self.weight, Some((&self.a, &self.b)));
        let output = Output {
            y: self.y.operand_mut(),
            h: Some(self.h.operand_mut()),
        };
        forward(
            kernels,
            self.shape.tokens,
            self.shape.in_features,
            self.x.operand(),
            &[projection],
            &[output],
            self.workspace.operand_mut(),
        )
    }

    /// `y` of the frozen product alone.
    pub fn frozen_forward(&mut self, kernels: &Kernels) -> Result<(), LaunchError> {
        let output = Output {
            y: self.y.operand_mut(),
            h: None,
        };
        forward(
            kernels,
            self.shape.tokens,
            self.shape.in_features,
            self.x.operand(),
            &[projection(self.shape, &self.weight, None)],
            &[output],
            self.workspace.operand_mut(),
        )
    }

    /// What is wanted of the backward pass.
    pub fn backward(&mut self, kernels: &Kernels, wanted: Wanted) -> Result<(), LaunchError> {
        let update = (wanted != Wanted::FrozenDx).then_some((&self.a, &self.b));
        let trained = matches!(wanted, Wanted::All | Wanted::Gradients);
        let item = Backward {
            projection: projection(self.shape, &self.weight, update),
            dy: self.dy.operand(),
            h: trained.then(|| self.h.operand()),
            gradients: trained.then(|| Gradients {
                a: self.da.operand_mut(),
                b: self.db.operand_mut(),
            }),
        };
        let dx = (wanted != Wanted::Gradients).then(|| self.dx.operand_mut());
        backward(
            kernels,
            self.shape.tokens,
            self.shape.in_features,
            self.x.operand(),
            &[item],
            dx,
            self.workspace.operand_mut(),
        )
    }
}

fn projection<'a>(
    shape: Shape,
    weight: &'a Buffer,
    update: Option<(&'a Buffer, &'a Buffer)>,
) -> Projection<'a> {
    Projection {
        weight: weight.operand(),
        bias: None,
        out_features: shape.out_features,
        lora: update.map(|(a, b)| Lora {
            a: a.operand(),
            b: b.operand(),
            rank: shape.rank,
            scaling: 1.0,
            dropout: None,
        }),
    }
}
