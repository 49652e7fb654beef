use super::Shape;
use crate::device::{Buffer, Device};
use anyhow::Result;
use fuselora_kernels::lora_linear::{
    Backward, Gradients, Lora, Output, Projection, Weight, backward, backward_workspace, forward,
    forward_workspace, partial_sums,
};
use fuselora_kernels::{Element, Kernels, LaunchError, Operand, OperandMut};

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
        let (forward, backward) = workspace(shape, element);
        Ok(Fused {
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
            workspace: device.empty(Element::F32, forward.max(backward))?,
        })
    }

    /// `y`, and `h` for the backward pass.
    pub fn forward(&mut self, kernels: &Kernels) -> Result<(), LaunchError> {
        let update = (self.a.operand(), self.b.operand());
        let projection = projection(self.shape, self.weight.operand(), Some(update));
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
            &[projection(self.shape, self.weight.operand(), None)],
            &[output],
            self.workspace.operand_mut(),
        )
    }

    /// What is wanted of the backward pass.
    pub fn backward(&mut self, kernels: &Kernels, wanted: Wanted) -> Result<(), LaunchError> {
        let update = (wanted != Wanted::FrozenDx).then(|| (self.a.operand(), self.b.operand()));
        let trained = matches!(wanted, Wanted::All | Wanted::Gradients);
        let item = Backward {
            projection: projection(self.shape, self.weight.operand(), update),
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

/// The f32 elements that a forward and a backward pass keep between their launches.
fn workspace(shape: Shape, element: Element) -> (u64, u64) {
    let projection = unplaced(shape, element);
    // SAFETY: no kernel is given it.
    let nowhere = || unsafe { OperandMut::from_raw(0, 0, Element::F32) };
    let item = Backward {
        projection,
        dy: nothing(element),
        h: Some(nothing(Element::F32)),
        gradients: Some(Gradients {
            a: nowhere(),
            b: nowhere(),
        }),
    };
    (
        forward_workspace(shape.tokens, shape.in_features, &[projection]),
        backward_workspace(shape.tokens, shape.in_features, &[item]),
    )
}

/// The f32 partial sums of a forward and a backward pass.
pub fn partials(shape: Shape, element: Element) -> u64 {
    let projection = unplaced(shape, element);
    partial_sums(element, shape.tokens, shape.in_features, &projection)
}

/// The layer as the launcher's sizes ask for it, without tensors.
fn unplaced(shape: Shape, element: Element) -> Projection<'static> {
    let update = (nothing(Element::F32), nothing(Element::F32));
    projection(shape, nothing(element), Some(update))
}

fn nothing(element: Element) -> Operand<'static> {
    // SAFETY: no kernel is given it.
    unsafe { Operand::from_raw(0, 0, element) }
}

fn projection<'a>(
    shape: Shape,
    weight: Operand<'a>,
    update: Option<(Operand<'a>, Operand<'a>)>,
) -> Projection<'a> {
    Projection {
        weight: Weight::Dense(weight),
        bias: None,
        out_features: shape.out_features,
        lora: update.map(|(a, b)| Lora {
            a,
            b,
            rank: shape.rank,
            scaling: 1.0,
            dropout: None,
        }),
    }
}
