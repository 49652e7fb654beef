use super::pass::{Pass, Split, pass, sum};
use super::{Input, Lora, Projection, Workspace, product};
use crate::abi::LoraSide;
use crate::{Kernels, LaunchError, Operand, OperandMut};

/// Where the result of one projection goes.
#[derive(Debug)]
pub struct Output<'a> {
    /// `[tokens, out]`.
    pub y: OperandMut<'a>,
    /// `drop(x)·Aᵀ`, unscaled, `[tokens, rank]` f32: there where the projection has an update. The
    /// backward pass needs it.
    pub h: Option<OperandMut<'a>>,
}

/// Elements of the f32 workspace that [`forward`] needs.
pub fn forward_workspace(tokens: u32, in_features: u32, projections: &[Projection]) -> u64 {
    Workspace::for_any(|element| {
        let split = Split::new(Pass::H, element, tokens, in_features);
        updates(projections)
            .map(|(_, lora)| Workspace::padded(split.row_partials(lora)))
            .sum()
    })
}

/// `y = x·Wᵀ + bias + scaling·(drop(x)·Aᵀ)·Bᵀ` for each of at most four projections that read
/// `x [tokens, in_features]`, f32, f16 or bf16.
///
/// `workspace` is f32, at least [`forward_workspace`] long, and starts at a multiple of 16 bytes.
///
/// # Errors
/// When a length, type, rank or probability does not fit, when `h` is missing where a projection has
/// an update, when the shape is beyond what a grid covers, or when the driver refuses.
pub fn forward(
    kernels: &Kernels,
    tokens: u32,
    in_features: u32,
    x: Operand,
    projections: &[Projection],
    outputs: &[Output],
    workspace: OperandMut,
) -> Result<(), LaunchError> {
    let input = Input::check(tokens, in_features, &x, projections.len())?;
    if outputs.len() != projections.len() {
        return Err(LaunchError::Length {
            tensor: "outputs",
            expected: projections.len() as u64,
            found: outputs.len() as u64,
        });
    }
    for (projection, output) in projections.iter().zip(outputs) {
        input.check_projection(projection)?;
        input.expect_activations("y", &output.y, projection.out_features)?;
        match (&projection.lora, &output.h) {
            (Some(lora), Some(h)) => input.expect_low_rank("h", h, lora)?,
            (Some(lora), None) => return Err(missing("h", tokens, lora)),
            (None, _) => {}
        }
    }
    let needed = forward_workspace(tokens, in_features, projections);
    let mut workspace = Workspace::new(&workspace, needed)?;

    let split = Split::new(Pass::H, input.element, tokens, in_features);
    let (mut sides, mut sums) = (Vec::new(), Vec::new());
    for (index, lora) in updates(projections) {
        let partials = workspace.take(split.row_partials(lora));
        sides.push(LoraSide {
            wide: lora.a.address(),
            row_partials: partials,
            dropout: lora.dropout(),
            rank: lora.rank,
            ..LoraSide::default()
        });
        let h = outputs[index].h.as_ref().map_or(0, |h| h.address());
        sums.push(split.row_sum(lora, partials, h, 1.0));
    }
    pass(kernels, Pass::H, input.element, &split, x.address(), &sides)?;
    sum(kernels, &sums)?;

    for (projection, output) in projections.iter().zip(outputs) {
        let mut term = projection.term(x.address(), in_features)?;
        if let (Some(lora), Some(h)) = (&projection.lora, &output.h) {
            term.left_low = h.address();
            term.right_low = lora.b.address();
            term.rank = lora.rank;
            term.scaling = lora.scaling;
        }
        product::forward(
            kernels,
            input.element,
            tokens,
            projection.out_features,
            term,
            projection.bias.map_or(0, |bias| bias.address()),
            output.y.address(),
        )?;
    }
    Ok(())
}

/// The projections that have an update, with their positions.
fn updates<'a>(projections: &'a [Projection]) -> impl Iterator<Item = (usize, &'a Lora<'a>)> {
    projections
        .iter()
        .enumerate()
        .filter_map(|(index, projection)| Some((index, projection.lora.as_ref()?)))
}

/// The error of a low-rank tensor that is needed and was not given.
pub(super) fn missing(tensor: &'static str, tokens: u32, lora: &Lora) -> LaunchError {
    LaunchError::Length {
        tensor,
        expected: u64::from(tokens) * u64::from(lora.rank),
        found: 0,
    }
}
