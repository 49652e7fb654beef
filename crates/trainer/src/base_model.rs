//! What every command starts from: a checkpoint, its model on a device, its tokenizer.

use std::path::Path;

use anyhow::Context;
use fuselora_tensor::Purpose;
use fuselora_transformer::adapter::Adapter;
use fuselora_transformer::checkpoint::Checkpoint;
use fuselora_transformer::lora::Lora;
use fuselora_transformer::model::Model;
use fuselora_transformer::tokenizer::Tokenizer;

use crate::cli::RowArgs;
use crate::data::{Dataset, Encode, Encoding, FieldNames, Limits};
use crate::machine::Machine;
use crate::mistake;

/// A frozen model with what belongs to it.
pub struct BaseModel {
    /// The files it comes from.
    pub checkpoint: Checkpoint,
    /// The weights.
    pub model: Model,
    /// Absent where the checkpoint has no `tokenizer.json`; rows then must be tokenized already.
    pub tokenizer: Option<Tokenizer>,
}

impl BaseModel {
    /// Loads the checkpoint at `path`: a Hugging Face folder or a GGUF file.
    ///
    /// # Errors
    /// What is wrong with the files, by name.
    pub fn load(path: &Path, machine: &Machine) -> anyhow::Result<BaseModel> {
        let checkpoint = Checkpoint::open(path)?;
        if machine.nf4.is_some() && checkpoint.nf4_source_dtype().is_some() {
            eprintln!(
                "{} is in NF4 already: it is loaded as it is, without --load-in-4bit",
                path.display()
            );
        }
        let (device, dtype) = (&machine.device, machine.dtype.into());
        let model = Model::load_quantized(&checkpoint, device, dtype, machine.nf4.as_ref())
            .with_context(|| format!("{} cannot be loaded", path.display()))?;
        let has_tokenizer = checkpoint.gguf().is_some() || path.join("tokenizer.json").exists();
        let tokenizer = has_tokenizer
            .then(|| Tokenizer::open(&checkpoint))
            .transpose()?;
        Ok(BaseModel {
            checkpoint,
            model,
            tokenizer,
        })
    }

    /// The tokenizer, for commands that read or write text.
    ///
    /// # Errors
    /// A [`mistake::Mistake`] where the checkpoint has none.
    pub fn tokenizer(&self) -> anyhow::Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            mistake!(
                "{} holds no tokenizer.json, which text needs",
                self.checkpoint.path().display()
            )
        })
    }

    /// Reads an adapter for this model.
    ///
    /// # Errors
    /// What is wrong with the files, or does not fit the model, by name.
    pub fn adapter(&self, folder: &Path) -> anyhow::Result<Lora> {
        let device = self.model.device();
        let _holding = device.hold(Purpose::Adapter);
        let adapter = Adapter::read(folder, self.model.modules(), device)?;
        Ok(Lora::bind(adapter, &self.model)?)
    }

    /// Reads the rows of a JSONL file as `rows` says; `end_text` as in [`Encoding`].
    ///
    /// # Errors
    /// As [`Dataset::load`].
    pub fn dataset(
        &self,
        file: &Path,
        rows: &RowArgs,
        end_text: bool,
    ) -> anyhow::Result<(Dataset, Limits)> {
        self.dataset_of(file, &rows.field_names(), rows, end_text)
    }

    /// [`BaseModel::dataset`] of these fields.
    ///
    /// # Errors
    /// As [`Dataset::load`].
    pub fn dataset_of(
        &self,
        file: &Path,
        fields: &FieldNames,
        rows: &RowArgs,
        end_text: bool,
    ) -> anyhow::Result<(Dataset, Limits)> {
        let limits = Limits {
            max_seq_length: rows.max_seq_length,
            vocab_size: self.model.config().vocab_size,
        };
        let encoding = Encoding {
            tokenizer: self
                .tokenizer
                .as_ref()
                .map(|tokenizer| tokenizer as &dyn Encode),
            chat_template: !rows.no_chat_template,
            mask_prompt: rows.mask_prompt,
            end_text,
        };
        Ok((Dataset::load(file, fields, &encoding, limits)?, limits))
    }
}
