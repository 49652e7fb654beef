//! Rotary tables, made as long as the rows that come.

use std::sync::Arc;

use fuselora_tensor::ops::rope::RopeTable;
use fuselora_tensor::{Device, Purpose};

use super::Model;
use crate::config::{DecoderConfig, Positions, RopeScaling};
use crate::error::{Error, Result};

/// Positions that the rotary table covers at first; it doubles when a longer row comes.
pub(super) const FIRST_ROPE_POSITIONS: usize = 2048;

impl Model {
    /// The rotary table of rows of up to `positions` tokens, unless positions are learned.
    pub(super) fn rope(&self, positions: usize) -> Result<Option<Arc<RopeTable>>> {
        if self.learned_positions.is_some() {
            let longest = self.config.max_position_embeddings;
            return if positions <= longest {
                Ok(None)
            } else {
                Err(Error::Input(format!(
                    "a row of {positions} tokens is longer than the {longest} positions that this model has learned"
                )))
            };
        }
        if self.depends_on_length() && positions > self.config.max_position_embeddings {
            return rope_table(&self.device, &self.config, positions);
        }
        let poisoned = || Error::Input("the rotary table is unusable after a panic".into());
        let table = self.rope.read().map_err(|_| poisoned())?.clone();
        if table
            .as_ref()
            .is_some_and(|t| t.cos.shape()[0] >= positions)
        {
            return Ok(table);
        }
        let mut slot = self.rope.write().map_err(|_| poisoned())?;
        let covered = if self.depends_on_length() {
            self.config.max_position_embeddings
        } else {
            positions.next_power_of_two()
        };
        *slot = rope_table(&self.device, &self.config, covered)?;
        Ok(slot.clone())
    }

    /// Whether rotary frequencies change with the longest row.
    fn depends_on_length(&self) -> bool {
        let Positions::Rotary(rope) = &self.config.positions else {
            return false;
        };
        matches!(rope.scaling, RopeScaling::Dynamic { .. })
    }
}

/// The table of a model with rotary positions.
pub(super) fn rope_table(
    device: &Device,
    config: &DecoderConfig,
    positions: usize,
) -> Result<Option<Arc<RopeTable>>> {
    let Positions::Rotary(rope) = &config.positions else {
        return Ok(None);
    };
    let inv_freq = rope.inv_freq(config.head_dim, positions);
    let _holding = device.hold(Purpose::Weights);
    Ok(Some(Arc::new(RopeTable::new(
        device, &inv_freq, positions, 1.0,
    )?)))
}
