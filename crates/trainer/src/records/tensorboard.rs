//! TensorBoard event files.
//!
//! A file is a sequence of TFRecords (length, its masked CRC-32C, payload, its masked CRC-32C), each holding
//! a `tensorflow.Event` (tensorflow/core/util/event.proto). The few fields needed are encoded by hand.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Context;

use super::Metrics;

/// Fields of `tensorflow.Event`.
mod event {
    pub const WALL_TIME: u64 = 1;
    pub const STEP: u64 = 2;
    pub const FILE_VERSION: u64 = 3;
    pub const SUMMARY: u64 = 5;
    pub const SESSION_LOG: u64 = 7;
}

/// The field of `tensorflow.Summary`, and those of its `Value`.
mod summary {
    pub const VALUE: u64 = 1;
    pub const TAG: u64 = 1;
    pub const SIMPLE_VALUE: u64 = 2;
}

/// The field of `tensorflow.SessionLog`, and the value that starts a session.
mod session_log {
    pub const STATUS: u64 = 1;
    pub const START: u64 = 1;
}

/// Protocol Buffers wire types.
#[derive(Clone, Copy)]
enum Wire {
    Varint = 0,
    Fixed64 = 1,
    Bytes = 2,
    Fixed32 = 5,
}

/// Writes scalars into an event file of its own.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Opens a new event file in `folder`, which is made where missing. `resumed_step` is the step that a
    /// run is continued from: TensorBoard then forgets what older files hold beyond it.
    ///
    /// # Errors
    /// The system's, with the path.
    pub fn create(folder: &Path, resumed_step: Option<u64>) -> anyhow::Result<EventWriter> {
        fs::create_dir_all(folder)
            .with_context(|| format!("{} cannot be made", folder.display()))?;
        let now = now();
        let name = format!(
            "events.out.tfevents.{:010}.{}.fuselora",
            now.as_secs(),
            std::process::id()
        );
        let path = folder.join(name);
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.with_context(|| format!("{} cannot be written", path.display()))?;
        let mut writer = EventWriter { path, file };
        let mut version = Vec::new();
        put_bytes(&mut version, event::FILE_VERSION, b"brain.Event:2");
        writer.write(0, &version)?;
        if let Some(step) = resumed_step {
            let mut log = Vec::new();
            put_varint(&mut log, session_log::STATUS, session_log::START);
            let mut start = Vec::new();
            put_bytes(&mut start, event::SESSION_LOG, &log);
            // Everything from the event's step on is forgotten, and `step` itself is to stay.
            writer.write(step + 1, &start)?;
        }
        Ok(writer)
    }

    /// Writes the scalars of a step or an evaluation, under the names of the Transformers trainer.
    ///
    /// # Errors
    /// The system's, with the path.
    pub fn append(&mut self, metrics: &Metrics) -> anyhow::Result<()> {
        let scalars = match metrics {
            Metrics::Train(metrics) => vec![
                ("train/loss", metrics.loss),
                ("train/grad_norm", metrics.grad_norm),
                ("train/learning_rate", metrics.learning_rate),
                ("train/epoch", metrics.epoch),
                ("train/tokens_per_s", metrics.tokens_per_s),
            ],
            Metrics::Eval(metrics) => vec![("eval/loss", metrics.eval_loss)],
        };
        let mut values = Vec::new();
        for (tag, scalar) in scalars {
            let mut value = Vec::new();
            put_bytes(&mut value, summary::TAG, tag.as_bytes());
            put_key(&mut value, summary::SIMPLE_VALUE, Wire::Fixed32);
            value.extend((scalar as f32).to_le_bytes());
            put_bytes(&mut values, summary::VALUE, &value);
        }
        let mut fields = Vec::new();
        put_bytes(&mut fields, event::SUMMARY, &values);
        self.write(metrics.step(), &fields)
    }

    fn write(&mut self, step: u64, fields: &[u8]) -> anyhow::Result<()> {
        let mut payload = Vec::new();
        put_key(&mut payload, event::WALL_TIME, Wire::Fixed64);
        payload.extend(now().as_secs_f64().to_le_bytes());
        put_varint(&mut payload, event::STEP, step);
        payload.extend(fields);
        let written = self.file.write_all(&record(&payload));
        written.with_context(|| format!("{} cannot be written", self.path.display()))
    }
}

fn now() -> std::time::Duration {
    // A clock before 1970 is shown as 1970.
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

/// A TFRecord.
fn record(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut record = length.to_vec();
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(payload);
    record.extend(masked_crc(payload).to_le_bytes());
    record
}

/// TFRecord's checksum: CRC-32C, rotated and offset so that a record within a record does not check itself.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

fn put_key(out: &mut Vec<u8>, field: u64, wire: Wire) {
    put_raw_varint(out, field << 3 | wire as u64);
}

fn put_varint(out: &mut Vec<u8>, field: u64, value: u64) {
    put_key(out, field, Wire::Varint);
    put_raw_varint(out, value);
}

fn put_bytes(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_key(out, field, Wire::Bytes);
    put_raw_varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn put_raw_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::metrics::tests::{eval, train};

    #[test]
    fn varints_follow_protocol_buffers() {
        let mut out = Vec::new();
        put_varint(&mut out, 1, 150);
        assert_eq!(out, [0x08, 0x96, 0x01]);
    }

    #[test]
    fn records_begin_as_in_files_that_tensorflow_wrote() {
        // The head of every event file of TensorFlow, whose first event has 24 bytes.
        let head = [0x18, 0, 0, 0, 0, 0, 0, 0, 0xa3, 0x7f, 0x4b, 0x22];
        let record = record(&[7; 24]);
        assert_eq!(record[..12], head);
        assert_eq!(record[12..36], [7; 24]);
        assert_eq!(record.len(), 40);
    }

    #[test]
    fn a_file_is_a_chain_of_whole_records() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(folder.path(), Some(4)).unwrap();
        writer.append(&train(5, 2.5)).unwrap();
        writer.append(&eval(5, 2.0)).unwrap();
        let path = fs::read_dir(folder.path())
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path();
        let bytes = fs::read(path).unwrap();
        let mut rest = &bytes[..];
        let mut payloads = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            payloads.push(&rest[12..12 + length]);
            assert_eq!(record(payloads.last().unwrap()), rest[..16 + length]);
            rest = &rest[16 + length..];
        }
        assert_eq!(payloads.len(), 4);
        let contains = |payload: &[u8], text: &str| {
            payload
                .windows(text.len())
                .any(|part| part == text.as_bytes())
        };
        assert!(contains(payloads[0], "brain.Event:2"));
        assert!(
            contains(payloads[2], "train/loss") && contains(payloads[2], "train/learning_rate")
        );
        assert!(contains(payloads[3], "eval/loss"));
    }
}
