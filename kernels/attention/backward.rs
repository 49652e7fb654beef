//! Launches `backward_f32.cu` and `backward_16bit.cu`.

use super::{Attention, Tile, Tiling, function};
use crate::abi::ATTENTION_THREADS;
use crate::launch::{ByStorage, GRID_X, GRID_YZ, blocks};
use crate::modules;
use crate::{Element, Kernels, LaunchError, Operand, OperandMut};
use cudarc::driver::{LaunchConfig, PushKernelArg, result};

const Q: [&ByStorage; 3] = [
    &modules::ATTENTION_BACKWARD_Q_64,
    &modules::ATTENTION_BACKWARD_Q_128,
    &modules::ATTENTION_BACKWARD_Q_256,
];
const KV: [&ByStorage; 3] = [
    &modules::ATTENTION_BACKWARD_KV_64,
    &modules::ATTENTION_BACKWARD_KV_128,
    &modules::ATTENTION_BACKWARD_KV_256,
];

/// The tensors of the forward pass, and the gradient of its output.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    /// The gradient of `o`, shaped and typed as `o`.
    pub d_o: Operand<'a>,
    /// As [`forward`](super::forward) was given it.
    pub q: Operand<'a>,
    /// As [`forward`](super::forward) was given it.
    pub k: Operand<'a>,
    /// As [`forward`](super::forward) was given it.
    pub v: Operand<'a>,
    /// As [`forward`](super::forward) made it.
    pub o: Operand<'a>,
    /// As [`forward`](super::forward) made it.
    pub lse: Operand<'a>,
}

/// Where the gradients go, each shaped and typed as its tensor.
#[derive(Debug)]
pub struct Gradients<'a> {
    /// Of `q`.
    pub dq: OperandMut<'a>,
    /// Of `k`; zero for keys beyond `kv_rows`.
    pub dk: OperandMut<'a>,
    /// Of `v`; zero for keys beyond `kv_rows`.
    pub dv: OperandMut<'a>,
}

/// The gradients of [`forward`](super::forward) for the gradient `d_o` of its output. The probabilities are
/// computed again from `lse`. `statistics` is f32 scratch of [`Attention::statistics_len`] elements.
///
/// # Errors
/// As [`forward`](super::forward).
pub fn backward(
    kernels: &Kernels,
    attention: &Attention,
    saved: &Saved,
    statistics: OperandMut,
    gradients: Gradients,
) -> Result<(), LaunchError> {
    attention.check()?;
    let &Saved {
        d_o,
        q,
        k,
        v,
        o,
        lse,
    } = saved;
    let Gradients { dq, dk, dv } = gradients;
    let tiling = Tiling::of(attention, q.element());
    let q_kernel = Q[tiling.index].of("q", q.element())?;
    let kv_kernel = KV[tiling.index].of("q", q.element())?;
    attention.check_tensors(
        q.element(),
        [("q", &q), ("o", &o), ("d_o", &d_o), ("dq", &dq)],
        [("k", &k), ("v", &v), ("dk", &dk), ("dv", &dv)],
    )?;
    lse.check("lse", Element::F32, attention.query_heads())?;
    statistics.check("statistics", Element::F32, attention.statistics_len())?;
    statistics.check_aligned("statistics", 8)?;

    let shape = attention.shape(&[&q, &k, &v, &o, &d_o, &dq, &dk, &dv]);
    let kv_heads = blocks("kv_heads", shape.kv_heads.into(), 1, GRID_X)?;
    let sequences = blocks("sequences", attention.sequences(), 1, GRID_YZ)?;
    let launch = |kernel, rows: u64, tile: Tile, addresses: &[u64]| {
        let tiles = blocks("rows", rows, tile.rows.into(), GRID_YZ / tile.blocks)?;
        if tiles == 0 || sequences == 0 {
            return Ok(());
        }
        let config = LaunchConfig {
            grid_dim: (kv_heads, sequences, tiles * tile.blocks),
            block_dim: (ATTENTION_THREADS, 1, 1),
            shared_mem_bytes: tile.shared_bytes,
        };
        let function = function(kernels, kernel, tile.shared_bytes)?;
        let mut launch = kernels.stream().launch_builder(&function);
        addresses.iter().for_each(|address| {
            launch.arg(address);
        });
        launch.arg(&shape);
        // SAFETY: the arguments are the kernel's parameters in order; the lengths were checked against
        // the shape, and the boundaries are the caller's promise.
        unsafe { launch.launch(config) }?;
        Ok::<(), LaunchError>(())
    };
    let [d_o, q, k, v, o, lse] = [d_o, q, k, v, o, lse].map(|tensor| tensor.address());
    let statistics = statistics.address();
    let [q_seqlens, k_seqlens] =
        [attention.q_rows, attention.kv_rows].map(|rows| rows.cu_seqlens.address());
    let max_keys = u64::from(attention.kv_rows.max_len);

    launch(
        q_kernel,
        attention.max_rows(),
        tiling.backward_q(),
        &[
            d_o,
            q,
            k,
            v,
            o,
            lse,
            statistics,
            dq.address(),
            q_seqlens,
            k_seqlens,
        ],
    )?;
    launch(
        kv_kernel,
        max_keys,
        tiling.backward_kv(),
        &[
            d_o,
            q,
            k,
            v,
            statistics,
            dk.address(),
            dv.address(),
            q_seqlens,
            k_seqlens,
        ],
    )?;
    zero_from(
        kernels,
        &dk,
        u64::from(attention.kv_rows.total) * attention.kv_width(),
    )?;
    zero_from(
        kernels,
        &dv,
        u64::from(attention.kv_rows.total) * attention.kv_width(),
    )
}

/// Zeros the elements from `first` on.
fn zero_from(kernels: &Kernels, tensor: &OperandMut, first: u64) -> Result<(), LaunchError> {
    let size = tensor.element().size_in_bytes();
    let bytes = (tensor.len() - first) * size;
    if bytes > 0 {
        kernels.stream().context().bind_to_thread()?;
        // SAFETY: these bytes are the end of a buffer that is borrowed to be written.
        unsafe {
            result::memset_d8_async(
                tensor.address() + first * size,
                0,
                bytes as usize,
                kernels.stream().cu_stream(),
            )
        }?;
    }
    Ok(())
}
