//! Launches `forward_f32.cu`, `forward_16bit.cu` and `merge.cu`.

use super::{Attention, Tiling, function};
use crate::abi::{ATTENTION_MERGE_THREADS, ATTENTION_THREADS};
use crate::launch::{ByStorage, GRID_X, GRID_YZ, blocks};
use crate::modules;
use crate::{Element, Kernels, LaunchError, Operand, OperandMut};
use cudarc::driver::{LaunchConfig, PushKernelArg};

const KERNELS: [&ByStorage; 3] = [
    &modules::ATTENTION_FORWARD_64,
    &modules::ATTENTION_FORWARD_128,
    &modules::ATTENTION_FORWARD_256,
];

/// `o = softmax(scale · q·kᵀ)·v` for each sequence and head, and `lse`, the logarithm of each softmax's
/// denominator.
///
/// `q` and `o` are `[tokens, heads·head_dim]`, `k` and `v` `[kv_tokens, kv_heads·head_dim]`, all of one type;
/// `k` and `v` may hold more tokens than `kv_rows` counts. `lse [tokens, heads]` is f32, and so is `partial`,
/// scratch of [`Attention::partial_len`] elements.
///
/// # Errors
/// When a length or type does not fit, when the batch is beyond what a grid covers, or when the driver
/// refuses.
#[expect(clippy::too_many_arguments, reason = "the tensors of the equation")]
pub fn forward(
    kernels: &Kernels,
    attention: &Attention,
    q: Operand,
    k: Operand,
    v: Operand,
    o: OperandMut,
    lse: OperandMut,
    partial: OperandMut,
) -> Result<(), LaunchError> {
    attention.check()?;
    let tiling = Tiling::of(attention, q.element());
    let kernel = KERNELS[tiling.index].of("q", q.element())?;
    let merge = modules::ATTENTION_MERGE.of("q", q.element())?;
    attention.check_tensors(q.element(), [("q", &q), ("o", &o)], [("k", &k), ("v", &v)])?;
    lse.check("lse", Element::F32, attention.query_heads())?;
    partial.check("partial", Element::F32, attention.partial_len())?;
    if o.is_empty() {
        return Ok(());
    }

    let shape = attention.shape(&[&q, &k, &v, &o, &partial]);
    let split = shape.splits > 1;
    let partial_lse = partial.address()
        + 4 * u64::from(shape.splits) * attention.query_heads() * u64::from(shape.head_dim);
    let (to_o, to_lse) = match split {
        false => (o.address(), lse.address()),
        true => (partial.address(), partial_lse),
    };
    let rows = attention.max_rows();
    let tile = tiling.forward();
    let tiles = blocks("q_rows", rows, tile.rows.into(), GRID_YZ / shape.splits)?;
    let config = LaunchConfig {
        grid_dim: (
            blocks("kv_heads", shape.kv_heads.into(), 1, GRID_X)?,
            blocks("sequences", attention.sequences(), 1, GRID_YZ)?,
            tiles * shape.splits,
        ),
        block_dim: (ATTENTION_THREADS, 1, 1),
        shared_mem_bytes: tile.shared_bytes,
    };
    let function = function(kernels, kernel, config.shared_mem_bytes)?;
    let inputs = [q, k, v].map(|tensor| tensor.address());
    let seqlens = [attention.q_rows, attention.kv_rows].map(|rows| rows.cu_seqlens.address());
    let mut launch = kernels.stream().launch_builder(&function);
    inputs
        .iter()
        .chain([&to_o, &to_lse])
        .chain(&seqlens)
        .for_each(|address| {
            launch.arg(address);
        });
    launch.arg(&shape);
    // SAFETY: the arguments are the kernel's parameters in order; the lengths were checked against the
    // shape, and the boundaries are the caller's promise.
    unsafe { launch.launch(config) }?;

    if split {
        let config = LaunchConfig {
            grid_dim: (
                blocks("o", o.len(), ATTENTION_MERGE_THREADS.into(), GRID_X)?,
                1,
                1,
            ),
            block_dim: (ATTENTION_MERGE_THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        let function = kernels.function(merge)?;
        let (o, lse) = (o.address(), lse.address());
        let mut launch = kernels.stream().launch_builder(&function);
        launch.arg(&to_o).arg(&to_lse).arg(&o).arg(&lse).arg(&shape);
        // SAFETY: as above.
        unsafe { launch.launch(config) }?;
    }
    Ok(())
}
