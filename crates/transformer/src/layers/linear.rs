//! Frozen projections with their low-rank pairs.

use std::ops::Range;
use std::sync::Arc;

use fuselora_tensor::ops::lora_linear::{self, Backward, Dropout, Gradients, Lora, Projection};
use fuselora_tensor::ops::{columns, dora, elementwise, linear_gradients, segmented_lora};
use fuselora_tensor::{Tensor, Weight};

use crate::adapter::{LoraWeights, TokenRows};
use crate::error::{Error, Result};
use crate::lora::{LoraGradients, Pass};

/// One frozen projection, `y = x·Wᵀ + bias`.
pub struct Linear {
    /// Module path, as PEFT names it: `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Position in the model's list of modules: where its pair stands in a [`crate::lora::Lora`].
    pub index: usize,
    /// `[out_features, in_features]`; shared with the embedding where they are tied.
    pub weight: Arc<Weight>,
    /// `[out_features]`.
    pub bias: Option<Tensor>,
}

/// The result of one projection.
pub struct Output {
    /// `[tokens, out_features]`.
    pub y: Tensor,
    /// What backward needs.
    pub saved: Saved,
}

/// What the backward pass of one projection needs besides its input.
pub struct Saved {
    h: Option<Tensor>,
    /// The output before DoRA's magnitudes.
    z: Option<Tensor>,
}

impl Linear {
    fn projection<'a>(&'a self, pass: &Pass<'a>) -> Result<Projection<'a>> {
        Ok(Projection {
            weight: pass.weight(self.index, &self.weight)?,
            bias: self.bias(pass)?,
            lora: pass.operand(self.index),
        })
    }

    fn bias<'a>(&'a self, pass: &Pass<'a>) -> Result<Option<&'a Tensor>> {
        pass.bias(self.index, self.bias.as_ref())
    }

    /// Adds to the gradients of bias, weight and token rows, where they are trained.
    fn own_backward(
        &self,
        x: &Tensor,
        dy: &Tensor,
        pass: &Pass<'_>,
        gradients: &mut LoraGradients,
    ) -> Result<()> {
        if let Some(LoraWeights {
            bias: Some(db),
            scaling,
            ..
        }) = gradients.update(self.index)
        {
            linear_gradients::bias(dy, *scaling, db)?;
        }
        if let Some(trained) = gradients.trained(self.index) {
            if let Some(db) = &mut trained.bias {
                linear_gradients::bias(dy, 1.0, db)?;
            }
            if let Some(dw) = trained.weight.as_mut().and_then(Weight::dense_mut) {
                linear_gradients::weight(dy, x, dw)?;
            }
        }
        let Some((owner, _)) = pass.tokens(self.index) else {
            return Ok(());
        };
        let trained = gradients.trained(owner);
        if let Some(TokenRows { indices, rows }) = trained.and_then(|t| t.tokens.as_mut()) {
            let ids = Tensor::from_u32(dy.device(), [indices.len()], indices)?;
            linear_gradients::weight(&columns::take(dy, &ids)?, x, rows)?;
        }
        Ok(())
    }

    /// Whether the frozen weight, too, sees a dropped-out input: PEFT's DoRA in training.
    fn drops_frozen_input<'a>(&'a self, pass: &Pass<'a>) -> Result<Option<Dropout<'a>>> {
        let dropout = pass.operand(self.index).and_then(|lora| lora.dropout);
        Ok(match pass.direction(self.index, &self.weight)? {
            Some(_) => dropout,
            None => None,
        })
    }
}

/// Projects one input through several projections that share it; one output each, in order.
pub fn forward<const N: usize>(
    x: &Tensor,
    linears: [&Linear; N],
    pass: &Pass<'_>,
) -> Result<[Output; N]> {
    let mut outputs = Vec::with_capacity(N);
    for group in groups(&linears, pass)? {
        match group {
            Group::Shared(range) => outputs.extend(shared_forward(x, &linears[range], pass)?),
            Group::Dropped(index, dropout) => {
                outputs.push(dropped_forward(x, linears[index], dropout, pass)?);
            }
        }
    }
    for (linear, output) in linears.iter().zip(&outputs) {
        pass.check(&output.y, || linear.name.clone())?;
    }
    // Each projection is in one group.
    outputs
        .try_into()
        .map_err(|_| Error::Input("a projection lost its output".into()))
}

/// The backward pass of [`forward`]: adds the pairs' gradients and returns `dx`, summed over the projections.
///
/// `dys` and `saved` are in the order of `linears`.
pub fn backward<const N: usize>(
    x: &Tensor,
    linears: [&Linear; N],
    dys: [&Tensor; N],
    saved: [&Saved; N],
    pass: &Pass<'_>,
    gradients: &mut LoraGradients,
    need_dx: bool,
) -> Result<Option<Tensor>> {
    let mut sum: Option<Tensor> = None;
    for (linear, dy) in linears.iter().zip(dys) {
        linear.own_backward(x, dy, pass, gradients)?;
    }
    for group in groups(&linears, pass)? {
        let dx = match group {
            Group::Shared(range) => {
                let (linears, dys, saved) =
                    (&linears[range.clone()], &dys[range.clone()], &saved[range]);
                shared_backward(x, linears, dys, saved, pass, gradients, need_dx)?
            }
            Group::Dropped(index, dropout) => {
                let (linear, dy, saved) = (linears[index], dys[index], saved[index]);
                dropped_backward(x, linear, dropout, dy, saved, pass, gradients, need_dx)?
            }
        };
        match (&mut sum, dx) {
            (Some(sum), Some(dx)) => elementwise::add_assign(sum, &dx)?,
            (None, dx) => sum = dx,
            (Some(_), None) => {}
        }
    }
    if let Some(dx) = &sum {
        pass.check(dx, || {
            format!(
                "the input gradient of {}",
                linears.map(|l| l.name.as_str()).join(", ")
            )
        })?;
    }
    Ok(sum)
}

/// Projections that read the same input.
enum Group<'a> {
    /// One call for all of them.
    Shared(Range<usize>),
    /// One whose frozen weight reads a dropped-out input of its own.
    Dropped(usize, Dropout<'a>),
}

fn groups<'a>(linears: &[&'a Linear], pass: &Pass<'a>) -> Result<Vec<Group<'a>>> {
    let mut groups: Vec<Group> = Vec::new();
    for (index, linear) in linears.iter().enumerate() {
        match (linear.drops_frozen_input(pass)?, groups.last_mut()) {
            (Some(dropout), _) => groups.push(Group::Dropped(index, dropout)),
            (None, Some(Group::Shared(range))) => range.end = index + 1,
            (None, _) => groups.push(Group::Shared(index..index + 1)),
        }
    }
    Ok(groups)
}

/// `y = x·Wᵀ + bias + scaling·drop(x)·Aᵀ·Bᵀ`; with DoRA `y = gain ∘ z + bias`, `z = x·(W + scaling·B·A)ᵀ`.
fn shared_forward(x: &Tensor, linears: &[&Linear], pass: &Pass<'_>) -> Result<Vec<Output>> {
    let mut projections = Vec::with_capacity(linears.len());
    let mut directions = Vec::with_capacity(linears.len());
    for linear in linears {
        let direction = pass.direction(linear.index, &linear.weight)?;
        let mut projection = linear.projection(pass)?;
        if direction.is_some() {
            projection.bias = None;
        }
        projections.push(projection);
        directions.push(direction);
    }
    let mut outputs = lora_linear::forward(x, &projections)?;
    if !pass.mixed.is_empty() {
        for (output, linear) in outputs.iter_mut().zip(linears) {
            segmented_lora::add_assign(&mut output.y, x, &pass.segments(linear.index)?)?;
        }
    }
    let outputs = outputs.into_iter().zip(linears.iter().zip(directions));
    outputs
        .map(|(output, (linear, direction))| {
            let (y, z) = match direction {
                None => (output.y, None),
                Some(direction) => {
                    let y = dora::forward(&output.y, &direction.gain, linear.bias(pass)?)?;
                    (y, Some(output.y))
                }
            };
            let saved = Saved { h: output.h, z };
            Ok(Output { y, saved })
        })
        .collect()
}

fn shared_backward(
    x: &Tensor,
    linears: &[&Linear],
    dys: &[&Tensor],
    saved: &[&Saved],
    pass: &Pass<'_>,
    gradients: &mut LoraGradients,
    need_dx: bool,
) -> Result<Option<Tensor>> {
    let mut taken: Vec<Option<LoraWeights>> = linears
        .iter()
        .map(|linear| gradients.take(linear.index))
        .collect();
    let result = (|| {
        let mut dzs = Vec::with_capacity(linears.len());
        for (((linear, dy), saved), taken) in linears.iter().zip(dys).zip(saved).zip(&mut taken) {
            dzs.push(direction_backward(linear, dy, saved, taken, pass)?);
        }
        let items = linears
            .iter()
            .zip(&mut taken)
            .zip(dys.iter().zip(&dzs).zip(saved))
            .map(|((linear, gradient), ((dy, dz), saved))| {
                Ok(Backward {
                    projection: linear.projection(pass)?,
                    dy: dz.as_ref().unwrap_or(dy),
                    h: saved.h.as_ref(),
                    gradients: gradient.as_mut().map(operand),
                })
            })
            .collect::<Result<_>>()?;
        Ok(lora_linear::backward(x, items, need_dx)?)
    })();
    for (linear, gradient) in linears.iter().zip(taken) {
        gradients.put(linear.index, gradient);
    }
    result
}

/// The gradient of `z`, where DoRA made `y` of it; adds to the magnitude's gradient.
fn direction_backward(
    linear: &Linear,
    dy: &Tensor,
    saved: &Saved,
    gradient: &mut Option<LoraWeights>,
    pass: &Pass<'_>,
) -> Result<Option<Tensor>> {
    let Some(direction) = pass.direction(linear.index, &linear.weight)? else {
        return Ok(None);
    };
    let z = saved.z.as_ref().ok_or_else(|| {
        Error::Input(format!(
            "{}: its output before DoRA was not kept",
            linear.name
        ))
    })?;
    let d_magnitude = gradient
        .as_mut()
        .and_then(|gradient| gradient.magnitude.as_mut());
    let dz = dora::backward(dy, z, &direction.gain, &direction.norm, d_magnitude)?;
    Ok(Some(dz))
}

/// DoRA with dropout as PEFT trains it: with `x' = drop(x)`, the update is `(gain - 1) ∘ x'·Wᵀ + gain ∘
/// scaling·x'·Aᵀ·Bᵀ`, so that `y = (x - x')·Wᵀ + bias + gain ∘ z`, `z = x'·(W + scaling·B·A)ᵀ`.
fn dropped_forward(
    x: &Tensor,
    linear: &Linear,
    dropout: Dropout<'_>,
    pass: &Pass<'_>,
) -> Result<Output> {
    let dropped = lora_linear::dropout(x, dropout)?;
    let mut rest = x.try_clone()?;
    elementwise::subtract_assign(&mut rest, &dropped)?;
    let frozen = Projection {
        lora: None,
        ..linear.projection(pass)?
    };
    let [mut frozen] = one(lora_linear::forward(&rest, &[frozen])?)?;
    drop(rest);
    let [adapted] = one(lora_linear::forward(
        &dropped,
        &[adapted_projection(linear, pass)?],
    )?)?;
    if let Some(direction) = pass.direction(linear.index, &linear.weight)? {
        let scaled = dora::forward(&adapted.y, &direction.gain, None)?;
        elementwise::add_assign(&mut frozen.y, &scaled)?;
    }
    Ok(Output {
        y: frozen.y,
        saved: Saved {
            h: adapted.h,
            z: Some(adapted.y),
        },
    })
}

/// With `u = dy·W` and `v` the input gradient of `z`: `dx = u + drop(v - u)`.
#[expect(
    clippy::too_many_arguments,
    reason = "a backward pass reads what its forward saved"
)]
fn dropped_backward(
    x: &Tensor,
    linear: &Linear,
    dropout: Dropout<'_>,
    dy: &Tensor,
    saved: &Saved,
    pass: &Pass<'_>,
    gradients: &mut LoraGradients,
    need_dx: bool,
) -> Result<Option<Tensor>> {
    let mut gradient = gradients.take(linear.index);
    let adapted = direction_backward(linear, dy, saved, &mut gradient, pass).and_then(|dz| {
        let item = Backward {
            projection: adapted_projection(linear, pass)?,
            dy: dz.as_ref().unwrap_or(dy),
            h: saved.h.as_ref(),
            gradients: gradient.as_mut().map(operand),
        };
        let dropped = lora_linear::dropout(x, dropout)?;
        Ok(lora_linear::backward(&dropped, vec![item], need_dx)?)
    });
    gradients.put(linear.index, gradient);
    let Some(mut difference) = adapted? else {
        return Ok(None);
    };
    let frozen = Backward {
        projection: Projection {
            lora: None,
            ..linear.projection(pass)?
        },
        dy,
        h: None,
        gradients: None,
    };
    let Some(mut dx) = lora_linear::backward(x, vec![frozen], true)? else {
        return Ok(None);
    };
    elementwise::subtract_assign(&mut difference, &dx)?;
    elementwise::add_assign(&mut dx, &lora_linear::dropout(&difference, dropout)?)?;
    Ok(Some(dx))
}

/// Weight and pair without bias and dropout.
fn adapted_projection<'a>(linear: &'a Linear, pass: &Pass<'a>) -> Result<Projection<'a>> {
    let Projection { weight, lora, .. } = linear.projection(pass)?;
    Ok(Projection {
        weight,
        bias: None,
        lora: lora.map(|lora| Lora {
            dropout: None,
            ..lora
        }),
    })
}

fn one<T>(items: Vec<T>) -> Result<[T; 1]> {
    items
        .try_into()
        .map_err(|_| Error::Input("a projection lost its output".into()))
}

fn operand(gradient: &mut LoraWeights) -> Gradients<'_> {
    Gradients {
        a: &mut gradient.a,
        b: &mut gradient.b,
    }
}
