use super::{AttentionConfig, Rows, cpu};
use crate::{DType, Result, Tensor, cuda::extents};
use fuselora_kernels::attention::{self, Attention, Gradients, Saved};

/// The call as the launchers take it; shapes were checked.
fn call<'a>(
    config: &AttentionConfig,
    q_rows: &'a Rows,
    kv_rows: &'a Rows,
) -> Result<Attention<'a>> {
    let rows = |rows: &'a Rows| -> Result<attention::Rows<'a>> {
        let [total, max_len] = extents("rows", [rows.total(), rows.max_len()])?;
        Ok(attention::Rows {
            cu_seqlens: rows.cu_seqlens().operand(),
            total,
            max_len,
        })
    };
    let [heads, kv_heads, head_dim] =
        extents("q", [config.heads, config.kv_heads, config.head_dim])?;
    Ok(Attention {
        heads,
        kv_heads,
        head_dim,
        scale: config.scale,
        // A window that no sequence is as long as hides nothing.
        window: config.window.and_then(|window| u32::try_from(window).ok()),
        q_rows: rows(q_rows)?,
        kv_rows: rows(kv_rows)?,
    })
}

#[expect(clippy::too_many_arguments, reason = "the tensors of the equation")]
pub(super) fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    q_rows: &Rows,
    kv_rows: &Rows,
    config: &AttentionConfig,
    o: &mut Tensor,
    lse: &mut Tensor,
) -> Result<()> {
    let call = call(config, q_rows, kv_rows)?;
    let len = call.partial_len() as usize;
    let mut partial = Tensor::workspace(q.device(), [len], DType::F32)?;
    q.device().launch(|kernels| {
        attention::forward(
            kernels,
            &call,
            q.operand(),
            k.operand(),
            v.operand(),
            o.operand_mut(),
            lse.operand_mut(),
            partial.operand_mut(),
        )
    })
}

pub(super) fn backward(
    saved: &cpu::Saved,
    q_rows: &Rows,
    kv_rows: &Rows,
    config: &AttentionConfig,
) -> Result<(Tensor, Tensor, Tensor)> {
    let call = call(config, q_rows, kv_rows)?;
    let (q, k) = (saved.q, saved.k);
    let device = q.device();
    let mut dq = Tensor::empty(device, q.shape(), q.dtype())?;
    let mut dk = Tensor::empty(device, k.shape(), k.dtype())?;
    let mut dv = Tensor::empty(device, k.shape(), k.dtype())?;
    let len = call.statistics_len() as usize;
    let mut statistics = Tensor::workspace(device, [len], DType::F32)?;
    let operands = Saved {
        d_o: saved.d_o.operand(),
        q: q.operand(),
        k: k.operand(),
        v: saved.v.operand(),
        o: saved.o.operand(),
        lse: saved.lse.operand(),
    };
    device.launch(|kernels| {
        let gradients = Gradients {
            dq: dq.operand_mut(),
            dk: dk.operand_mut(),
            dv: dv.operand_mut(),
        };
        attention::backward(
            kernels,
            &call,
            &operands,
            statistics.operand_mut(),
            gradients,
        )
    })?;
    Ok((dq, dk, dv))
}
