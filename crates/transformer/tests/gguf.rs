//! GGUF against what the Python package `gguf` wrote and dequantized (`make_fixtures.py`).

use std::{collections::BTreeMap, fs, path::PathBuf};

use fuselora_tensor::{DType, Device};
use fuselora_transformer::{
    checkpoint::Checkpoint,
    convert::gguf_to_hugging_face,
    gguf::{GgmlType, GgufFile},
    tokenizer::Tokenizer,
};
use proptest::prelude::*;
use serde_json::{Value, json};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

/// The f32 tensors of a safetensors file, by the `safetensors` library.
fn expected(name: &str) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = fs::read(fixture(name)).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let floats = |bytes: &[u8]| {
        bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect()
    };
    file.tensors()
        .into_iter()
        .map(|(name, view)| (name, (view.shape().to_vec(), floats(view.data()))))
        .collect()
}

#[test]
fn every_type_dequantizes_to_the_bit() {
    let expected = expected("blocks.safetensors");
    assert_eq!(expected.len(), 11);
    let file = GgufFile::open(&fixture("blocks.gguf")).unwrap();
    for (name, (shape, values)) in expected {
        assert_eq!(shape, [2, 512]);
        for (i, (found, wanted)) in file
            .tensor_f32(&name)
            .unwrap()
            .iter()
            .zip(&values)
            .enumerate()
        {
            assert_eq!(
                found.to_bits(),
                wanted.to_bits(),
                "{name} element {i}: {found} for {wanted}"
            );
        }
    }
    assert_eq!(GgmlType::known().split(", ").count(), 11);
}

fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) {
    let at = bytes
        .windows(from.len())
        .position(|window| window == from)
        .unwrap();
    bytes[at..at + to.len()].copy_from_slice(to);
}

#[test]
fn a_llama_has_its_hugging_face_names_rows_and_configuration() {
    let checkpoint = Checkpoint::open(fixture("tiny-llama.gguf")).unwrap();
    let expected = expected("tiny-llama.safetensors");
    assert_eq!(
        checkpoint.tensor_names().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>()
    );
    for (name, (shape, values)) in &expected {
        assert_eq!(&checkpoint.info(name).unwrap().shape, shape, "{name}");
        assert_eq!(&checkpoint.tensor_f32(name).unwrap(), values, "{name}");
        let tensor = checkpoint.load(name, &Device::cpu(), DType::F32).unwrap();
        assert_eq!(&tensor.to_f32_vec().unwrap(), values, "{name}");
    }
    let config = checkpoint.config();
    let wanted = json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "vocab_size": 700, "tie_word_embeddings": true,
        "attention_bias": false, "rope_scaling": null, "bos_token_id": 1, "eos_token_id": 2,
    });
    for (key, value) in wanted.as_object().unwrap() {
        assert_eq!(&config[key], value, "{key}");
    }
}

#[test]
fn a_conversion_holds_the_same_model_and_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model");
    let gguf = Checkpoint::open(fixture("tiny-llama.gguf")).unwrap();
    for (dtype, tolerance) in [
        (DType::F32, 0.0),
        (DType::F16, 2f32.powi(-11)),
        (DType::BF16, 2f32.powi(-8)),
    ] {
        // The second and third conversions replace the one before.
        gguf_to_hugging_face(&gguf, &out, dtype).unwrap();
        let converted = Checkpoint::open(&out).unwrap();
        let mut config = gguf.config().clone();
        config["torch_dtype"] = converted.config()["torch_dtype"].clone();
        assert_eq!(converted.config(), &config);
        for (name, (_, values)) in expected("tiny-llama.safetensors") {
            assert_eq!(
                converted
                    .load(&name, &Device::cpu(), dtype)
                    .unwrap()
                    .dtype(),
                dtype
            );
            for (found, wanted) in converted.tensor_f32(&name).unwrap().iter().zip(values) {
                // Below the smallest normal f16, rounding is to a fixed step.
                assert!(
                    (found - wanted).abs() <= tolerance * wanted.abs() + tolerance * 2f32.powi(-14),
                    "{name}: {found} for {wanted}"
                );
            }
        }
    }
    let (a, b) = (
        Tokenizer::open(&gguf).unwrap(),
        Tokenizer::from_folder(&out).unwrap(),
    );
    let text = "<|im_start|>user\nIn 2024<|im_end|>";
    assert_eq!(a.encode(text, true).unwrap(), b.encode(text, true).unwrap());
    assert_eq!(
        (b.bos_token_id(), b.eos_token_ids(), b.pad_token_id()),
        (Some(1), &[2][..], Some(2))
    );
    assert_eq!(
        a.chat_template().unwrap().source(),
        b.chat_template().unwrap().source()
    );
}

#[test]
fn ids_are_those_of_an_independent_byte_pair_encoding() {
    let tokenizer =
        Tokenizer::open(&Checkpoint::open(fixture("tiny-llama.gguf")).unwrap()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 700);
    let cases: Value = serde_json::from_slice(&fs::read(fixture("tokens.json")).unwrap()).unwrap();
    for case in cases.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(json!(ids), case["tiny"], "{text:?}");
        let mut stream = tokenizer.stream();
        let mut streamed = String::new();
        for &id in &ids {
            streamed += &stream.push(id).unwrap();
        }
        streamed += &stream.finish().unwrap();
        assert_eq!(streamed, tokenizer.decode(&ids, true).unwrap(), "{text:?}");
    }
}

#[test]
fn ids_are_those_of_sentence_piece() {
    let gguf = GgufFile::open(&fixture("sentence-piece.gguf")).unwrap();
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
    let cases: Value =
        serde_json::from_slice(&fs::read(fixture("sentence-piece.json")).unwrap()).unwrap();
    for case in cases.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(json!(ids), case["ids"], "{text:?}");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        let mut stream = tokenizer.stream();
        let mut streamed = String::new();
        for &id in &ids {
            streamed += &stream.push(id).unwrap();
        }
        assert_eq!(streamed + &stream.finish().unwrap(), text);
    }
}

#[test]
fn refusals_say_what_is_known() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let refusal = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        Checkpoint::open(&path)
            .err()
            .expect("a refusal")
            .to_string()
    };
    let good = fs::read(fixture("tiny-llama.gguf")).unwrap();
    type Spoil = fn(&mut Vec<u8>);
    let cases: [(&str, Spoil); 6] = [
        ("is no GGUF file", |bytes| bytes[0] = b'X'),
        ("GGUF version 9", |bytes| bytes[4] = 9),
        ("known: llama", |bytes| {
            replace(
                bytes,
                b"\x05\0\0\0\0\0\0\0llama",
                b"\x05\0\0\0\0\0\0\0bloom",
            )
        }),
        ("truncated or corrupt", |bytes| {
            bytes.truncate(bytes.len() - 4096)
        }),
        ("truncated", |bytes| bytes.truncate(300)),
        ("`token_emb?.weight`: is unknown", |bytes| {
            replace(bytes, b"token_embd.weight", b"token_emb?.weight")
        }),
    ];
    for (expected, spoil) in cases {
        let mut bytes = good.clone();
        spoil(&mut bytes);
        let error = refusal(&bytes);
        assert!(
            error.contains(expected) && error.contains("m.gguf"),
            "{error}"
        );
    }
    let mut bytes = fs::read(fixture("blocks.gguf")).unwrap();
    let at = bytes
        .windows(4)
        .position(|window| window == b"Q4_0")
        .unwrap();
    // Behind the name: the number of dimensions, two extents, then the type.
    bytes[at + 4 + 4 + 16] = 99;
    let error = refusal(&bytes);
    assert!(
        error.contains("`Q4_0`") && error.contains("type 99") && error.contains("Q6_K"),
        "{error}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn mutated_files_never_panic(changes in proptest::collection::vec((0usize..16_000, any::<u8>()), 1..4), cut in 0usize..120_000, tiny: bool) {
        let mut bytes = fs::read(fixture(if tiny { "tiny-llama.gguf" } else { "blocks.gguf" })).unwrap();
        // Most of the first file's header is its vocabulary: half of the changes go where the counts are.
        for (at, value) in changes {
            let len = bytes.len();
            bytes[if at % 2 == 0 { at % 1500 } else { at } % len] = value;
        }
        if cut % 2 == 0 {
            bytes.truncate(cut);
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        fs::write(&path, bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(&path) {
            for name in checkpoint.tensor_names() {
                let _ = checkpoint.tensor_f32(name);
            }
            let _ = Tokenizer::open(&checkpoint);
        }
    }
}
