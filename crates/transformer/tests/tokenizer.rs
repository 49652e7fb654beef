//! What a tokenizer takes from the files beside `tokenizer.json`.

use std::{fs, path::PathBuf};

use fuselora_tensor::DType;
use fuselora_transformer::{
    checkpoint::Checkpoint, convert::gguf_to_hugging_face, tokenizer::Tokenizer,
};
use serde_json::{Value, json};

/// A folder with the tokenizer of `tiny-llama.gguf`.
fn folder() -> tempfile::TempDir {
    let fixture = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama.gguf");
    let folder = tempfile::tempdir().unwrap();
    gguf_to_hugging_face(
        &Checkpoint::open(fixture).unwrap(),
        folder.path(),
        DType::F32,
    )
    .unwrap();
    folder
}

#[test]
fn beginning_and_end_tokens_are_added_as_asked() {
    let folder = folder();
    let path = folder.path().join("tokenizer_config.json");
    let plain: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let ends = |bos: Value, eos: Value| {
        let mut config = plain.clone();
        config["add_bos_token"] = bos;
        config["add_eos_token"] = eos;
        // Older files have a special token as an object.
        config["bos_token"] = json!({ "content": "<|im_start|>", "lstrip": false });
        config["eos_token"] = json!("<|endoftext|>");
        fs::write(&path, config.to_string()).unwrap();
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
        let bare = tokenizer.encode("the", false).unwrap();
        let ids = tokenizer.encode("the", true).unwrap();
        let at = ids
            .windows(bare.len())
            .position(|window| window == bare)
            .unwrap();
        (ids[..at].to_vec(), ids[at + bare.len()..].to_vec())
    };
    assert_eq!(ends(Value::Null, Value::Null), (vec![], vec![]));
    assert_eq!(ends(json!(false), json!(false)), (vec![], vec![]));
    assert_eq!(ends(json!(true), Value::Null), (vec![1], vec![]));
    assert_eq!(ends(json!(false), json!(true)), (vec![], vec![0]));
    assert_eq!(ends(json!(true), json!(true)), (vec![1], vec![0]));
}

#[test]
fn a_generation_ends_at_any_of_its_end_tokens() {
    let folder = folder();
    let ends = || {
        Tokenizer::from_folder(folder.path())
            .unwrap()
            .eos_token_ids()
            .to_vec()
    };
    assert_eq!(ends(), [2]);
    let generation = folder.path().join("generation_config.json");
    fs::write(&generation, r#"{"eos_token_id": [0, 5]}"#).unwrap();
    assert_eq!(ends(), [0, 5, 2]);
    fs::remove_file(generation).unwrap();
    fs::write(folder.path().join("config.json"), r#"{"eos_token_id": 7}"#).unwrap();
    assert_eq!(ends(), [7, 2]);
}

#[test]
fn tokens_of_the_assistant_are_told_from_the_others() {
    let folder = folder();
    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
    let messages = json!([
        { "role": "user", "content": "What is this?" },
        { "role": "assistant", "content": "It is the end." },
        { "role": "user", "content": "Thanks" },
        { "role": "assistant", "content": "Yes" },
    ]);
    let chat = tokenizer
        .chat_template()
        .unwrap()
        .render_with_spans(&messages, None)
        .unwrap();
    let tokens = tokenizer
        .encode_spans(&chat.text, &chat.assistant, false)
        .unwrap();
    let ids: Vec<u32> = tokens.iter().map(|&(id, _)| id).collect();
    assert_eq!(ids, tokenizer.encode(&chat.text, false).unwrap());
    let said: Vec<u32> = tokens
        .iter()
        .filter(|(_, inside)| *inside)
        .map(|&(id, _)| id)
        .collect();
    assert_eq!(
        tokenizer.decode(&said, false).unwrap(),
        "It is the end.<|im_end|>\nYes<|im_end|>\n"
    );
}

#[test]
fn files_that_are_missing_or_corrupt_are_named() {
    let folder = folder();
    let refusal = || {
        Tokenizer::from_folder(folder.path())
            .err()
            .expect("a refusal")
            .to_string()
    };
    fs::write(folder.path().join("tokenizer_config.json"), "{").unwrap();
    assert!(refusal().contains("tokenizer_config.json: is not valid JSON"));
    fs::remove_file(folder.path().join("tokenizer_config.json")).unwrap();
    let bare = Tokenizer::from_folder(folder.path()).unwrap();
    assert!(bare.chat_template().is_none() && bare.bos_token_id().is_none());
    fs::write(folder.path().join("tokenizer.json"), r#"{"model": 1}"#).unwrap();
    assert!(refusal().contains("tokenizer.json: is no tokenizer that can be read"));
    fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    assert!(refusal().contains("holds no tokenizer.json"));
}
