//! The loss on rows that are not trained on.

use fuselora_tensor::Tensor;
use fuselora_transformer::batch::Batch;
use fuselora_transformer::lora::{AdapterRows, Lora, Pass};
use fuselora_transformer::model::Model;

use crate::data::{PackedBatch, Row};

/// The mean loss over target tokens.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Evaluation {
    /// Mean over all target tokens, in nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Number of target tokens.
    pub target_tokens: u64,
}

/// A packed batch on the model's device.
///
/// # Errors
/// No room on the device.
pub fn to_device(model: &Model, packed: &PackedBatch) -> anyhow::Result<Batch> {
    Ok(Batch::new(
        model.device(),
        &packed.tokens,
        &packed.lengths,
        &packed.target_rows,
        &packed.target_ids,
    )?)
}

/// The value of a tensor of one element, for which everything before it on its device must be done.
///
/// # Errors
/// When something on the device has failed.
pub fn scalar(tensor: &Tensor) -> anyhow::Result<f64> {
    Ok(f64::from(
        tensor.to_f32_vec()?.first().copied().unwrap_or_default(),
    ))
}

/// Evaluates a model, with an adapter or without, on all rows.
///
/// # Errors
/// No room on the device.
pub fn evaluate(
    model: &Model,
    lora: Option<&Lora>,
    rows: &[Row],
    batch_size: usize,
) -> anyhow::Result<Evaluation> {
    let rows: Vec<_> = rows.iter().map(|row| (row, lora)).collect();
    evaluate_mixed(model, &rows, batch_size)
}

/// Evaluates a model on rows that have an adapter of their own each, or none. The rows of a batch pass over the frozen
/// weights together.
///
/// # Errors
/// No room on the device, or adapters that cannot share a batch and have to.
pub fn evaluate_mixed(
    model: &Model,
    rows: &[(&Row, Option<&Lora>)],
    batch_size: usize,
) -> anyhow::Result<Evaluation> {
    let (mut loss, mut targets) = (0.0, 0);
    for rows in rows.chunks(batch_size) {
        let packed = PackedBatch::pack(rows.iter().map(|(row, _)| *row));
        let mixed = adapter_rows(rows);
        let pass = match &mixed[..] {
            // An adapter of every row need not be one that can share a batch.
            [all] if all.tokens == (0..packed.tokens.len()) => Pass {
                lora: Some(all.lora),
                ..Pass::default()
            },
            mixed => Pass {
                mixed,
                ..Pass::default()
            },
        };
        let mut batch_loss = model.zero_loss()?;
        model.loss(&to_device(model, &packed)?, &pass, &mut batch_loss)?;
        loss += scalar(&batch_loss)?;
        targets += packed.target_count() as u64;
    }
    let mean = loss / targets.max(1) as f64;
    Ok(Evaluation {
        loss: mean,
        perplexity: mean.exp(),
        target_tokens: targets,
    })
}

/// Which tokens of a packed batch have which adapter.
fn adapter_rows<'a>(rows: &[(&Row, Option<&'a Lora>)]) -> Vec<AdapterRows<'a>> {
    let mut end = 0;
    AdapterRows::merged(rows.iter().filter_map(|(row, lora)| {
        let tokens = end..end + row.tokens().len();
        end = tokens.end;
        Some(AdapterRows {
            tokens,
            lora: (*lora)?,
        })
    }))
}
