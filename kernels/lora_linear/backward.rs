use super::forward::missing;
use super::pass::{Pass, Split, pass, sum};
use super::{Input, Projection, Workspace, product};
use crate::abi::LoraSide;
use crate::{Element, Kernels, LaunchError, Operand, OperandMut};

/// The backward pass of one projection.
#[derive(Debug)]
pub struct Backward<'a> {
    /// As given to [`forward`](super::forward).
    pub projection: Projection<'a>,
    /// The gradient of `y`, `[tokens, out]`.
    pub dy: Operand<'a>,
    /// As [`forward`](super::forward) wrote it, `[tokens, rank]` f32; needed for the gradients.
    pub h: Option<Operand<'a>>,
    /// The gradients of the update, unless it is frozen or there is none.
    pub gradients: Option<Gradients<'a>>,
}

/// Where the gradients of an update are added, f32.
#[derive(Debug)]
pub struct Gradients<'a> {
    /// `[rank, in]`.
    pub a: OperandMut<'a>,
    /// `[out, rank]`.
    pub b: OperandMut<'a>,
}

/// Elements of the f32 workspace that [`backward`] needs.
pub fn backward_workspace(tokens: u32, in_features: u32, items: &[Backward]) -> u64 {
    Workspace::for_any(|element| {
        let da = Split::new(Pass::Da, element, tokens, in_features);
        items
            .iter()
            .filter_map(|item| {
                let lora = item.projection.lora.as_ref()?;
                let out_features = item.projection.out_features;
                let dy = Split::new(Pass::DhDb, element, tokens, out_features);
                let dh = u64::from(tokens) * u64::from(lora.rank);
                Some(
                    [
                        dh,
                        dy.row_partials(lora),
                        dy.column_partials(lora),
                        da.column_partials(lora),
                    ]
                    .map(Workspace::padded)
                    .iter()
                    .sum::<u64>(),
                )
            })
            .sum()
    })
}

/// The backward pass of [`forward`](super::forward). With `dH = scaling·dY·B` of each projection:
/// `dB += scaling·dYᵀ·H`, `dA += dHᵀ·drop(x)`, and `dX = Σ dY·W + drop(dH·A)` over the projections where
/// `dx [tokens, in_features]` is given. The weight and the bias have no gradient.
///
/// `workspace` is f32, at least [`backward_workspace`] long, and starts at a multiple of 16 bytes.
///
/// # Errors
/// When a length, type, rank or probability does not fit, when `h` is missing where gradients are
/// asked for, when the shape is beyond what a grid covers, or when the driver refuses.
pub fn backward(
    kernels: &Kernels,
    tokens: u32,
    in_features: u32,
    x: Operand,
    items: &[Backward],
    dx: Option<OperandMut>,
    workspace: OperandMut,
) -> Result<(), LaunchError> {
    let input = Input::check(tokens, in_features, &x, items.len())?;
    for item in items {
        input.check_projection(&item.projection)?;
        input.expect_activations("dy", &item.dy, item.projection.out_features)?;
        check_gradients(&input, item)?;
    }
    if let Some(dx) = &dx {
        input.expect_activations("dx", dx, in_features)?;
    }
    let needed = backward_workspace(tokens, in_features, items);
    let mut workspace = Workspace::new(&workspace, needed)?;

    let mut terms = Vec::new();
    let (mut dy_sums, mut da_sums, mut da_sides) = (Vec::new(), Vec::new(), Vec::new());
    let da_split = Split::new(Pass::Da, input.element, tokens, in_features);
    for item in items {
        let projection = &item.projection;
        let mut term = projection.term(item.dy.address(), projection.out_features)?;
        if let Some(lora) = &item.projection.lora {
            let out_features = item.projection.out_features;
            let split = Split::new(Pass::DhDb, input.element, tokens, out_features);
            let dh = workspace.take(u64::from(tokens) * u64::from(lora.rank));
            let dh_partials = workspace.take(split.row_partials(lora));
            let mut side = LoraSide {
                wide: lora.b.address(),
                row_partials: dh_partials,
                rank: lora.rank,
                ..LoraSide::default()
            };
            dy_sums.push(split.row_sum(lora, dh_partials, dh, lora.scaling));
            let mut of_dy = Pass::Dh;
            if let (Some(gradients), Some(h)) = (&item.gradients, &item.h) {
                of_dy = Pass::DhDb;
                side.tall = h.address();
                side.column_partials = workspace.take(split.column_partials(lora));
                dy_sums.push(split.column_sum(
                    lora,
                    side.column_partials,
                    gradients.b.address(),
                    lora.scaling,
                ));
                let da_partials = workspace.take(da_split.column_partials(lora));
                da_sides.push(LoraSide {
                    tall: dh,
                    column_partials: da_partials,
                    dropout: lora.dropout(),
                    rank: lora.rank,
                    ..LoraSide::default()
                });
                da_sums.push(da_split.column_sum(lora, da_partials, gradients.a.address(), 1.0));
            }
            pass(
                kernels,
                of_dy,
                input.element,
                &split,
                item.dy.address(),
                &[side],
            )?;
            term.left_low = dh;
            term.right_low = lora.a.address();
            term.dropout = lora.dropout();
            term.rank = lora.rank;
            term.scaling = 1.0;
        }
        terms.push(term);
    }
    sum(kernels, &dy_sums)?;
    pass(
        kernels,
        Pass::Da,
        input.element,
        &da_split,
        x.address(),
        &da_sides,
    )?;
    sum(kernels, &da_sums)?;
    match dx {
        None => Ok(()),
        Some(dx) => product::dx(
            kernels,
            input.element,
            tokens,
            in_features,
            &terms,
            dx.address(),
        ),
    }
}

fn check_gradients(input: &Input, item: &Backward) -> Result<(), LaunchError> {
    let Some(lora) = &item.projection.lora else {
        return match &item.gradients {
            None => Ok(()),
            Some(gradients) => Err(LaunchError::Length {
                tensor: "gradients of a projection without an update",
                expected: 0,
                found: gradients.a.len() + gradients.b.len(),
            }),
        };
    };
    if let Some(h) = &item.h {
        input.expect_low_rank("h", h, lora)?;
    }
    if let Some(gradients) = &item.gradients {
        if item.h.is_none() {
            return Err(missing("h", input.tokens, lora));
        }
        gradients
            .a
            .check("gradient of lora_a", Element::F32, lora.a.len())?;
        gradients
            .b
            .check("gradient of lora_b", Element::F32, lora.b.len())?;
    }
    Ok(())
}
