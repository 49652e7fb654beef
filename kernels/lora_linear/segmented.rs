//! Launches `segmented.cu`: low-rank updates that differ from row to row.

use super::{Input, Lora};
use crate::abi::{
    LORA_MAX_SEGMENTS, LORA_SEGMENT_OUTS, LORA_SEGMENT_ROWS, LORA_THREADS, LoraSegment,
    LoraSegments,
};
use crate::launch::{GRID_X, GRID_YZ, blocks, launch};
use crate::{Kernels, LaunchError, Operand, OperandMut, modules};
use std::ops::Range;

/// Rows of a batch that one update belongs to.
#[derive(Debug, Clone)]
pub struct Segment<'a> {
    /// Rows of `x` and `y`.
    pub rows: Range<u32>,
    /// Their update, without dropout.
    pub lora: Lora<'a>,
}

/// `y[rows] += scaling·(x[rows]·Aᵀ)·Bᵀ` for each segment, with `x [tokens, in_features]` and `y [tokens, out_features]`
/// of one type: f32, f16 or bf16. Segments are in ascending order and share no row.
///
/// # Errors
/// When a length, type or rank does not fit, segments overlap or reach beyond the rows, an update has dropout, the
/// shape is beyond what a grid covers, or the driver refuses.
pub fn add_segments(
    kernels: &Kernels,
    [tokens, in_features, out_features]: [u32; 3],
    x: Operand,
    segments: &[Segment],
    y: OperandMut,
) -> Result<(), LaunchError> {
    let input = Input::check(tokens, in_features, &x, 1)?;
    input.expect_activations("y", &y, out_features)?;
    let mut end = 0;
    for Segment { rows, lora } in segments {
        if rows.start < end || rows.end < rows.start || rows.end > tokens {
            return Err(LaunchError::Parameter {
                parameter: "a segment's first row",
                found: rows.start.into(),
                expected: "segments follow each other and end within the rows",
            });
        }
        end = rows.end;
        if lora.dropout.is_some() {
            return Err(LaunchError::Parameter {
                parameter: "dropout of a segment",
                found: 1,
                expected: "only training drops anything",
            });
        }
        input.check_lora(lora, out_features.into())?;
    }
    let columns = blocks(
        "out_features",
        out_features.into(),
        LORA_SEGMENT_OUTS.into(),
        GRID_X,
    )?;
    let kernel = modules::LORA_SEGMENTED.of("x", x.element())?;
    let with_rows: Vec<&Segment> = segments.iter().filter(|own| !own.rows.is_empty()).collect();
    for some in with_rows.chunks(LORA_MAX_SEGMENTS as usize) {
        let mut table = [LoraSegment::default(); LORA_MAX_SEGMENTS as usize];
        let mut tiles = 0;
        for (entry, Segment { rows, lora }) in table.iter_mut().zip(some) {
            *entry = LoraSegment {
                lora_a: lora.a.address(),
                lora_b: lora.b.address(),
                begin: rows.start,
                rows: rows.end - rows.start,
                rank: lora.rank,
                scaling: lora.scaling,
                first_tile: tiles as u32,
            };
            tiles += u64::from(rows.end - rows.start).div_ceil(LORA_SEGMENT_ROWS.into());
        }
        let all = LoraSegments {
            segments: table,
            x: x.address(),
            y: y.address(),
            count: some.len() as u32,
            in_features,
            out_features,
        };
        let grid = (columns, blocks("rows", tiles, 1, GRID_YZ)?, 1);
        if columns == 0 {
            continue;
        }
        // SAFETY: the kernel's parameter, whose lengths were checked against the shape.
        unsafe {
            launch!(kernels, kernel, grid, (LORA_THREADS, 1, 1), all);
        }
    }
    Ok(())
}
