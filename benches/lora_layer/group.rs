use crate::device::{Buffer, Device};
use anyhow::Result;
use fuselora_kernels::elementwise::add_assign;
use fuselora_kernels::lora_linear::{
    Backward, Gradients, Lora, Output, Projection, Weight, backward, backward_workspace, forward,
    forward_workspace,
};
use fuselora_kernels::{Element, Kernels, LaunchError};

/// Linear layers with their updates that share an input: computed together, or each in a call of its own.
pub struct Group {
    tokens: u32,
    in_features: u32,
    x: Buffer,
    dx: Buffer,
    /// A layer's part of `dx`.
    part: Buffer,
    layers: Vec<Layer>,
    workspace: Buffer,
}

struct Layer {
    factors: Factors,
    y: Buffer,
    h: Buffer,
    dy: Buffer,
    da: Buffer,
    db: Buffer,
}

struct Factors {
    out_features: u32,
    rank: u32,
    weight: Buffer,
    a: Buffer,
    b: Buffer,
}

impl Group {
    /// Random tensors, for a layer for each of `out_features`; activations and weights are stored as `element`.
    pub fn new(
        device: &Device,
        [tokens, in_features, rank]: [u32; 3],
        out_features: &[u32],
        element: Element,
    ) -> Result<Group> {
        let elements = |[a, b]: [u32; 2]| u64::from(a) * u64::from(b);
        let random = |element, extents| device.random(element, elements(extents));
        let layer = |&out: &u32| {
            Ok(Layer {
                factors: Factors {
                    out_features: out,
                    rank,
                    weight: random(element, [out, in_features])?,
                    a: random(Element::F32, [rank, in_features])?,
                    b: random(Element::F32, [out, rank])?,
                },
                y: random(element, [tokens, out])?,
                h: random(Element::F32, [tokens, rank])?,
                dy: random(element, [tokens, out])?,
                da: random(Element::F32, [rank, in_features])?,
                db: random(Element::F32, [out, rank])?,
            })
        };
        let mut group = Group {
            tokens,
            in_features,
            x: random(element, [tokens, in_features])?,
            dx: random(element, [tokens, in_features])?,
            part: random(element, [tokens, in_features])?,
            layers: out_features.iter().map(layer).collect::<Result<_>>()?,
            workspace: device.empty(Element::F32, 0)?,
        };
        let len = group.workspace_len();
        group.workspace = device.empty(Element::F32, len)?;
        Ok(group)
    }

    fn workspace_len(&mut self) -> u64 {
        let (tokens, in_features) = (self.tokens, self.in_features);
        let projections: Vec<_> = self
            .layers
            .iter()
            .map(|own| own.factors.projection())
            .collect();
        let forward = forward_workspace(tokens, in_features, &projections);
        let items: Vec<_> = self.layers.iter_mut().map(Layer::backward).collect();
        forward.max(backward_workspace(tokens, in_features, &items))
    }

    /// How many layers a call has.
    fn per_call(&self, together: bool) -> usize {
        if together { self.layers.len() } else { 1 }
    }

    /// Every `y` and `h`.
    pub fn forward(&mut self, kernels: &Kernels, together: bool) -> Result<(), LaunchError> {
        let per_call = self.per_call(together);
        for layers in self.layers.chunks_mut(per_call) {
            let (projections, outputs): (Vec<_>, Vec<_>) =
                layers.iter_mut().map(Layer::forward).unzip();
            forward(
                kernels,
                self.tokens,
                self.in_features,
                self.x.operand(),
                &projections,
                &outputs,
                self.workspace.operand_mut(),
            )?;
        }
        Ok(())
    }

    /// The gradients of every update, and `dx`, which is added up where calls are apart.
    pub fn backward(&mut self, kernels: &Kernels, together: bool) -> Result<(), LaunchError> {
        let per_call = self.per_call(together);
        for (index, layers) in self.layers.chunks_mut(per_call).enumerate() {
            let is_first = index == 0;
            let items: Vec<_> = layers.iter_mut().map(Layer::backward).collect();
            let dx = if is_first {
                &mut self.dx
            } else {
                &mut self.part
            };
            backward(
                kernels,
                self.tokens,
                self.in_features,
                self.x.operand(),
                &items,
                Some(dx.operand_mut()),
                self.workspace.operand_mut(),
            )?;
            if !is_first {
                add_assign(kernels, self.part.operand(), self.dx.operand_mut())?;
            }
        }
        Ok(())
    }
}

impl Layer {
    fn forward(&mut self) -> (Projection<'_>, Output<'_>) {
        let output = Output {
            y: self.y.operand_mut(),
            h: Some(self.h.operand_mut()),
        };
        (self.factors.projection(), output)
    }

    fn backward(&mut self) -> Backward<'_> {
        Backward {
            projection: self.factors.projection(),
            dy: self.dy.operand(),
            h: Some(self.h.operand()),
            gradients: Some(Gradients {
                a: self.da.operand_mut(),
                b: self.db.operand_mut(),
            }),
        }
    }
}

impl Factors {
    fn projection(&self) -> Projection<'_> {
        Projection {
            weight: Weight::Dense(self.weight.operand()),
            bias: None,
            out_features: self.out_features,
            lora: Some(Lora {
                a: self.a.operand(),
                b: self.b.operand(),
                rank: self.rank,
                scaling: 1.0,
                dropout: None,
            }),
        }
    }
}
