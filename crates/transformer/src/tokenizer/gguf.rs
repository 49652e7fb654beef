//! A GGUF file's tokenizer as Hugging Face's files.
//!
//! llama.cpp names a pre-tokenizer and has its rules in code (`llm_tokenizer_bpe` in `llama-vocab.cpp`);
//! here they are the `tokenizers` library's parts, so that `tokenizer.json` gives the same ids anywhere.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use crate::{
    error::{Error, Result},
    gguf::{GgufFile, Metadata},
};

/// What Hugging Face's libraries read beside a model's weights.
#[derive(Debug, Clone)]
pub struct TokenizerFiles {
    /// `tokenizer.json`.
    pub tokenizer: Value,
    /// `tokenizer_config.json`, with the chat template.
    pub config: Value,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Value,
    /// `generation_config.json`.
    pub generation: Value,
}

impl TokenizerFiles {
    /// Rebuilds the files from a GGUF file's metadata.
    ///
    /// # Errors
    /// When these are incomplete, contradict each other, or name a tokenizer that cannot be rebuilt.
    pub fn from_gguf(gguf: &GgufFile) -> Result<TokenizerFiles> {
        from_metadata(gguf.metadata()).map_err(|message| Error::file(gguf.path(), message))
    }
}

/// Kinds of tokens, as GGUF numbers them.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Control tokens that end an assistant's turn, whatever the file calls its end-of-text token.
const END_OF_TURN: [&str; 4] = ["<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>"];

struct Vocabulary<'a> {
    tokens: &'a [String],
    kinds: Vec<i64>,
    ids: HashMap<&'a str, usize>,
}

fn from_metadata(metadata: &Metadata) -> std::result::Result<TokenizerFiles, String> {
    let vocabulary = vocabulary(metadata)?;
    let model = metadata
        .string("tokenizer.ggml.model")
        .ok_or("has no metadata `tokenizer.ggml.model`")?;
    let parts = match model {
        "gpt2" => byte_level_bpe(metadata, &vocabulary)?,
        "llama" => sentence_piece_bpe(metadata, &vocabulary)?,
        other => {
            return Err(format!(
                "has the tokenizer model \"{other}\", which cannot be rebuilt; known: gpt2, llama"
            ));
        }
    };

    let token = |name: &str| -> std::result::Result<Option<u32>, String> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        match metadata.token(&key) {
            Some(id) if id as usize >= vocabulary.tokens.len() => Err(format!(
                "`{key}` is {id}, beyond the {} tokens",
                vocabulary.tokens.len()
            )),
            id => Ok(id),
        }
    };
    let (bos, eos, unknown) = (token("bos")?, token("eos")?, token("unknown")?);
    let padding = token("padding")?.or(eos);
    let add_bos = metadata
        .bool("tokenizer.ggml.add_bos_token")
        .unwrap_or(parts.adds_bos)
        && bos.is_some();
    let add_eos = metadata
        .bool("tokenizer.ggml.add_eos_token")
        .unwrap_or(false)
        && eos.is_some();

    let mut ends: Vec<u32> = eos
        .into_iter()
        .chain(token("eot")?)
        .chain(token("eom")?)
        .collect();
    ends.extend(END_OF_TURN.iter().filter_map(|name| {
        let id = *vocabulary.ids.get(name)?;
        (vocabulary.kinds[id] == CONTROL).then_some(id as u32)
    }));
    let mut seen = std::collections::HashSet::new();
    ends.retain(|id| seen.insert(*id));

    let text = |id: Option<u32>| id.map_or(Value::Null, |id| json!(vocabulary.tokens[id as usize]));
    let mut special = Map::new();
    for (key, id) in [
        ("bos_token", bos),
        ("eos_token", eos),
        ("unk_token", unknown),
        ("pad_token", padding),
    ] {
        if id.is_some() {
            special.insert(key.into(), text(id));
        }
    }
    let mut config = special.clone();
    config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    config.insert("clean_up_tokenization_spaces".into(), json!(false));
    if let Some(length) = metadata.unsigned("llama.context_length") {
        config.insert("model_max_length".into(), json!(length));
    }
    if let Some(template) = metadata.string("tokenizer.chat_template") {
        config.insert("chat_template".into(), json!(template));
    }

    let added: Vec<Value> = (0..vocabulary.tokens.len())
        .filter(|&id| matches!(vocabulary.kinds[id], UNKNOWN | CONTROL | USER_DEFINED))
        .map(|id| {
            json!({
                "id": id, "content": vocabulary.tokens[id], "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": vocabulary.kinds[id] != USER_DEFINED,
            })
        })
        .collect();
    let ends_of_text: Vec<(&str, u32)> = [
        add_bos.then_some(bos).flatten(),
        add_eos.then_some(eos).flatten(),
    ]
    .into_iter()
    .flatten()
    .map(|id| (vocabulary.tokens[id as usize].as_str(), id))
    .collect();
    let post_processor = if ends_of_text.is_empty() {
        parts.post_processor
    } else {
        template(&ends_of_text, add_bos)
    };
    let generation = json!({
        "bos_token_id": bos,
        "eos_token_id": if let [one] = ends.as_slice() { json!(one) } else { json!(ends) },
        "pad_token_id": padding,
    });
    Ok(TokenizerFiles {
        tokenizer: json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": parts.normalizer,
            "pre_tokenizer": parts.pre_tokenizer,
            "post_processor": post_processor,
            "decoder": parts.decoder,
            "model": parts.model,
        }),
        config: Value::Object(config),
        special_tokens_map: Value::Object(special),
        generation,
    })
}

fn vocabulary(metadata: &Metadata) -> std::result::Result<Vocabulary<'_>, String> {
    let tokens = metadata
        .strings("tokenizer.ggml.tokens")
        .ok_or("has no metadata `tokenizer.ggml.tokens`")?;
    let kinds = metadata
        .integers("tokenizer.ggml.token_type")
        .map_or_else(|| vec![NORMAL; tokens.len()], <[i64]>::to_vec);
    if kinds.len() != tokens.len() {
        return Err(format!(
            "has {} tokens, but {} token types",
            tokens.len(),
            kinds.len()
        ));
    }
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        if let Some(other) = ids.insert(token.as_str(), id) {
            return Err(format!(
                "has the token {token:?} twice, as {other} and {id}"
            ));
        }
    }
    Ok(Vocabulary { tokens, kinds, ids })
}

/// The parts of `tokenizer.json` that depend on the kind of tokenizer.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: Value,
    /// Whether a text begins with the beginning token where the file does not say.
    adds_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const KNOWN_PRE: &str =
    "default, gpt-2, llama-bpe, qwen2, tekken, smollm, starcoder, refact, command-r, codeshell";

fn byte_level_bpe(
    metadata: &Metadata,
    vocabulary: &Vocabulary,
) -> std::result::Result<Parts, String> {
    let merges = metadata
        .strings("tokenizer.ggml.merges")
        .ok_or("has no metadata `tokenizer.ggml.merges`")?;
    let merges: Vec<(&str, &str)> = merges
        .iter()
        .map(|merge| {
            merge
                .split_once(' ')
                .ok_or_else(|| format!("has the merge {merge:?}, which has no two parts"))
        })
        .collect::<std::result::Result<_, _>>()?;
    let byte_level = |use_regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex });
    let split = |pattern: &str| json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
    let sequence = |parts: Vec<Value>| json!({ "type": "Sequence", "pretokenizers": parts });
    let name = metadata.string("tokenizer.ggml.pre").unwrap_or("default");
    let pre_tokenizer = match name {
        "gpt-2" => byte_level(true),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" => sequence(vec![
            json!({ "type": "Digits", "individual_digits": true }),
            byte_level(true),
        ]),
        "llama-bpe" | "llama3" | "llama-v3" => sequence(vec![split(LLAMA3), byte_level(false)]),
        "qwen2" => sequence(vec![split(QWEN2), byte_level(false)]),
        "tekken" => sequence(vec![split(TEKKEN), byte_level(false)]),
        "default" => sequence(vec![
            split(r"[\p{P}\$\+<=>\^~\|]+"),
            split(GPT2),
            split(r"\p{N}+"),
            split("[0-9][0-9][0-9]"),
            byte_level(false),
        ]),
        other => {
            return Err(format!(
                "has the pre-tokenizer \"{other}\", which cannot be rebuilt; known: {KNOWN_PRE}"
            ));
        }
    };
    // These take a whole word that is a token as it is, whatever its merges would give, and begin each text
    // with the beginning token.
    let like_llama3 = matches!(name, "llama-bpe" | "llama3" | "llama-v3" | "tekken");
    Ok(Parts {
        normalizer: if name == "qwen2" {
            json!({ "type": "NFC" })
        } else {
            Value::Null
        },
        pre_tokenizer,
        post_processor: byte_level(true),
        decoder: byte_level(true),
        model: bpe(vocabulary, &merges, like_llama3, None, false),
        adds_bos: like_llama3,
    })
}

/// SentencePiece's BPE, which has scores in place of merges: of all neighbours whose union is a token, the
/// union with the best score merges first. So each way to cut a token in two is a merge, in order of score.
fn sentence_piece_bpe(
    metadata: &Metadata,
    vocabulary: &Vocabulary,
) -> std::result::Result<Parts, String> {
    let scores = metadata
        .floats("tokenizer.ggml.scores")
        .ok_or("has no metadata `tokenizer.ggml.scores`")?;
    if scores.len() != vocabulary.tokens.len() {
        return Err(format!(
            "has {} tokens, but {} scores",
            vocabulary.tokens.len(),
            scores.len()
        ));
    }
    let normal = |text: &str| {
        vocabulary
            .ids
            .get(text)
            .filter(|&&id| vocabulary.kinds[id] == NORMAL)
            .copied()
    };
    let mut merges: Vec<(usize, &str, &str)> = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if vocabulary.kinds[id] != NORMAL {
            continue;
        }
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            if normal(left).is_some() && normal(right).is_some() {
                merges.push((id, left, right));
            }
        }
    }
    merges.sort_by(|a, b| {
        scores[b.0]
            .total_cmp(&scores[a.0])
            .then(a.0.cmp(&b.0))
            .then(a.1.len().cmp(&b.1.len()))
    });
    let merges: Vec<(&str, &str)> = merges
        .into_iter()
        .map(|(_, left, right)| (left, right))
        .collect();
    let prefix = metadata
        .bool("tokenizer.ggml.add_space_prefix")
        .unwrap_or(true);
    let spaces = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
    let mut normalizers = vec![spaces];
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": "▁" }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    let unknown = metadata
        .token("tokenizer.ggml.unknown_token_id")
        .and_then(|id| vocabulary.tokens.get(id as usize));
    Ok(Parts {
        normalizer: json!({ "type": "Sequence", "normalizers": normalizers }),
        pre_tokenizer: Value::Null,
        post_processor: Value::Null,
        decoder: json!({ "type": "Sequence", "decoders": decoders }),
        model: bpe(
            vocabulary,
            &merges,
            false,
            unknown.map(String::as_str),
            true,
        ),
        adds_bos: true,
    })
}

fn bpe(
    vocabulary: &Vocabulary,
    merges: &[(&str, &str)],
    ignore_merges: bool,
    unknown: Option<&str>,
    byte_fallback: bool,
) -> Value {
    let vocab: Map<String, Value> = vocabulary
        .tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (token.clone(), json!(id)))
        .collect();
    json!({
        "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": byte_fallback, "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges, "vocab": vocab, "merges": merges,
    })
}

/// A post-processor that puts the first of `ends` before a text and the others behind it, or all behind it.
fn template(ends: &[(&str, u32)], first_is_before: bool) -> Value {
    let piece = |token: &str| json!({ "SpecialToken": { "id": token, "type_id": 0 } });
    let text = |name: &str, type_id: u32| json!({ "Sequence": { "id": name, "type_id": type_id } });
    let around = |middle: Value| {
        let mut pieces: Vec<Value> = ends.iter().map(|(token, _)| piece(token)).collect();
        pieces.insert(usize::from(first_is_before), middle);
        pieces
    };
    let mut pair = around(text("A", 0));
    pair.extend(around(text("B", 1)));
    let special: Map<String, Value> = ends
        .iter()
        .map(|(token, id)| {
            (
                token.to_string(),
                json!({ "id": token, "ids": [id], "tokens": [token] }),
            )
        })
        .collect();
    json!({ "type": "TemplateProcessing", "single": around(text("A", 0)), "pair": pair, "special_tokens": special })
}
