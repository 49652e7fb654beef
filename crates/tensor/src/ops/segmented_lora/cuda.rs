use super::Segment;
use crate::{Result, Tensor, cuda::extents};
use fuselora_kernels::lora_linear as kernel;

pub(super) fn add_assign(y: &mut Tensor, x: &Tensor, segments: &[Segment]) -> Result<()> {
    let (tokens, in_features) = x.matrix("x", "[tokens, in_features]")?;
    let (_, out_features) = y.matrix("y", "[tokens, out_features]")?;
    let shape = extents("y", [tokens, in_features, out_features])?;
    let segments: Vec<_> = segments
        .iter()
        .map(|Segment { rows, lora, .. }| {
            let [start, end, rank] = extents("a segment", [rows.start, rows.end, lora.rank()])?;
            Ok(kernel::Segment {
                rows: start..end,
                lora: kernel::Lora {
                    a: lora.a.operand(),
                    b: lora.b.operand(),
                    rank,
                    scaling: lora.scaling,
                    dropout: None,
                },
            })
        })
        .collect::<Result<_>>()?;
    x.device().launch(|kernels| {
        kernel::add_segments(kernels, shape, x.operand(), &segments, y.operand_mut())
    })
}
