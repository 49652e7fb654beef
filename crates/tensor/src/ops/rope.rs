//! Rotary position embedding (Su et al., "RoFormer", 2021) in the layout of GPT-NeoX and Llama: element `i`
//! of a head turns with element `i + rotary/2`.

use crate::{Device, Error, Result, Tensor, check, parallel, simd};
use rayon::prelude::*;

/// The cosines and sines of every position, `[positions, rotary/2]`, F32.
#[derive(Debug)]
pub struct RopeTable {
    /// `attention_scaling · cos(position · inv_freq)`.
    pub cos: Tensor,
    /// `attention_scaling · sin(position · inv_freq)`.
    pub sin: Tensor,
}

impl RopeTable {
    /// The table for `inv_freq [rotary/2]`. `attention_scaling` multiplies both (1 but for YaRN and LongRoPE).
    ///
    /// # Errors
    /// As [`Tensor::empty`].
    pub fn new(
        device: &Device,
        inv_freq: &[f64],
        positions: usize,
        attention_scaling: f64,
    ) -> Result<RopeTable> {
        let table = |f: fn(f64) -> f64| {
            let angles = (0..positions)
                .flat_map(|position| inv_freq.iter().map(move |f| position as f64 * f));
            let values: Vec<f32> = angles.map(|x| (attention_scaling * f(x)) as f32).collect();
            Tensor::from_f32(device, [positions, inv_freq.len()], &values)
        };
        Ok(RopeTable {
            cos: table(f64::cos)?,
            sin: table(f64::sin)?,
        })
    }
}

/// Turns `x [tokens, heads·head_dim]`, of a float type, in place by `positions [tokens]` U32. Elements of a head beyond the
/// rotary part stay.
///
/// # Errors
/// When a position is not in the table, and on shapes and data types that do not fit.
pub fn apply(x: &mut Tensor, heads: usize, positions: &Tensor, table: &RopeTable) -> Result<()> {
    rotate(x, heads, positions, table, 1.0)
}

/// The backward pass of [`apply`]: turns the other way.
///
/// # Errors
/// As [`apply`].
pub fn apply_inverse(
    dx: &mut Tensor,
    heads: usize,
    positions: &Tensor,
    table: &RopeTable,
) -> Result<()> {
    rotate(dx, heads, positions, table, -1.0)
}

fn rotate(
    x: &mut Tensor,
    heads: usize,
    positions: &Tensor,
    table: &RopeTable,
    direction: f32,
) -> Result<()> {
    let (tokens, width) = x.tokens("x", "[tokens, heads * head_dim]")?;
    let (rows, half) = table.cos.matrix("cos", "[positions, rotary / 2]")?;
    table.sin.check_shape("sin", &[rows, half])?;
    if heads == 0 || !width.is_multiple_of(heads) || width / heads < 2 * half {
        return Err(Error::Argument(format!(
            "x: {width} columns are not {heads} heads of at least {} rotary dimensions",
            2 * half
        )));
    }
    positions.check_shape("positions", &[tokens])?;
    check::devices(
        x.device(),
        [
            ("positions", positions),
            ("cos", &table.cos),
            ("sin", &table.sin),
        ],
    )?;
    check::indices("positions", positions, rows)?;
    #[cfg(feature = "cuda")]
    if !positions.device().is_cpu() {
        let [heads, head_dim, half, table_rows] =
            crate::cuda::extents("x", [heads, width / heads, half, rows])?;
        let shape = fuselora_kernels::abi::RopeShape {
            heads,
            head_dim,
            half,
            table_rows,
            direction,
        };
        return positions.device().launch(|kernels| {
            fuselora_kernels::rope::rope(
                kernels,
                shape,
                x.operand_mut(),
                positions.operand(),
                table.cos.operand(),
                table.sin.operand(),
            )
        });
    }
    let (positions, cos, sin, x) = (
        positions.u32("positions")?,
        table.cos.f32("cos")?,
        table.sin.f32("sin")?,
        x.f32_mut("x")?,
    );
    if width == 0 {
        return Ok(());
    }
    let per_task = parallel::rows_per_task(width);
    let chunks = x
        .par_chunks_mut(width * per_task)
        .zip(positions.par_chunks(per_task));
    parallel::for_each(chunks, |(rows, positions)| {
        simd::vectorize(
            #[inline(always)]
            || {
                for (row, &position) in rows.chunks_exact_mut(width).zip(positions) {
                    let cos = &cos[position as usize * half..][..half];
                    let sin = &sin[position as usize * half..][..half];
                    for head in row.chunks_exact_mut(width / heads) {
                        let (first, rest) = head.split_at_mut(half);
                        for (((a, b), &cos), &sin) in first.iter_mut().zip(rest).zip(cos).zip(sin) {
                            let sin = direction * sin;
                            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                        }
                    }
                }
            },
        );
    });
    Ok(())
}
