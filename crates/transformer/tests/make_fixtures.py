"""Makes the files under tests/fixtures with other implementations than ours, to hold ours against.

Run: python3 make_fixtures.py SMOLLM2.gguf TEXT, with the packages gguf, numpy, regex, safetensors, sentencepiece.
- blocks.gguf: random bytes of every GGML type, written by the package gguf; blocks.safetensors: what that
  package dequantizes them to.
- tiny-llama.gguf: a llama of two layers, whose q and k are permuted as llama.cpp's converter does it, with
  the first tokens and merges of SmolLM2's tokenizer; tiny-llama.safetensors: the tensors before that, by
  their Hugging Face names.
- sentence-piece.gguf: a SentencePiece BPE trained on TEXT with Llama 2's settings; sentence-piece.json: texts
  with the ids that the library sentencepiece gives them.
- tokens.json: texts with their ids under SmolLM2's whole tokenizer and under tiny-llama's, from the plain
  byte-pair encoding below.
"""
import io, json, pathlib, sys
import numpy as np, regex
import gguf, sentencepiece
from gguf import GGMLQuantizationType as T
from safetensors.numpy import save_file

OUT = pathlib.Path(__file__).parent / "fixtures"
rng = np.random.default_rng(7)

# --- blocks
writer = gguf.GGUFWriter(OUT / "blocks.gguf", "test")
expected = {}
TYPES = [T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q4_K, T.Q5_K, T.Q6_K]
# Where a block has its half-precision scales: random bytes there would be infinities and NaN.
SCALES = {T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208]}
for kind in TYPES:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    values = rng.standard_normal((2, 512)).astype(np.float32)
    if kind == T.F32:
        data = values
    elif kind == T.F16:
        data = values.astype(np.float16)
    elif kind == T.BF16:
        data = gguf.quantize(values, kind)
    else:
        data = rng.integers(0, 256, (2 * 512 // block, size), dtype=np.uint8)
        for at in SCALES[kind]:
            data[:, at : at + 2] = (rng.standard_normal(len(data)) / 8).astype(np.float16).view(np.uint8).reshape(-1, 2)
        data = data.reshape(2, -1)
    writer.add_tensor(kind.name, data, raw_dtype=kind)
    expected[kind.name] = np.ascontiguousarray(gguf.dequantize(data, kind).astype(np.float32).reshape(2, 512))
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
save_file(expected, OUT / "blocks.safetensors")

# --- the tokenizer, cut down
reader = gguf.GGUFReader(sys.argv[1])
field = lambda name: reader.fields[name].contents()
tokens, kinds, merges = (field(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
VOCAB = 700
# SmolLM2 has no token of two digits; with one, a tokenizer shows whether it splits digits before it merges.
few = tokens[: VOCAB - 1] + ["12"]
few_merges = ["1 2"] + [merge for merge in merges if set([*merge.split(" "), merge.replace(" ", "")]) <= set(few)]

# --- tiny llama
HIDDEN, INNER, HEADS, KV, DIM = 32, 64, 4, 2, 8


def permute(w, heads):  # LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


writer = gguf.GGUFWriter(OUT / "tiny-llama.gguf", "llama")
writer.add_block_count(2); writer.add_context_length(256); writer.add_embedding_length(HIDDEN)
writer.add_feed_forward_length(INNER); writer.add_head_count(HEADS); writer.add_head_count_kv(KV)
writer.add_rope_freq_base(100000.0); writer.add_layer_norm_rms_eps(1e-5); writer.add_rope_dimension_count(DIM)
writer.add_vocab_size(VOCAB)
writer.add_tokenizer_model("gpt2"); writer.add_tokenizer_pre("smollm"); writer.add_token_list(few)
writer.add_token_types(kinds[:VOCAB]); writer.add_token_merges(few_merges)
writer.add_bos_token_id(1); writer.add_eos_token_id(2); writer.add_unk_token_id(0); writer.add_pad_token_id(2)
writer.add_add_bos_token(False); writer.add_chat_template(field("tokenizer.chat_template"))
hf = {}


def tensor(name, hf_name, shape, heads=None, kind=T.F32):
    w = (rng.standard_normal(shape) / 8).astype(np.float32)
    stored = permute(w, heads) if heads else w
    if kind != T.F32:
        stored = gguf.quantize(stored, kind)
        back = gguf.dequantize(stored, kind).reshape(shape)
        w = back.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape) if heads else back
    writer.add_tensor(name, stored, raw_dtype=kind)
    hf[hf_name] = np.ascontiguousarray(w)


tensor("token_embd.weight", "model.embed_tokens.weight", (VOCAB, HIDDEN), kind=T.Q8_0)
tensor("output_norm.weight", "model.norm.weight", (HIDDEN,))
for i in range(2):
    layer = f"model.layers.{i}"
    tensor(f"blk.{i}.attn_norm.weight", f"{layer}.input_layernorm.weight", (HIDDEN,))
    tensor(f"blk.{i}.attn_q.weight", f"{layer}.self_attn.q_proj.weight", (HEADS * DIM, HIDDEN), HEADS, T.Q4_1)
    tensor(f"blk.{i}.attn_k.weight", f"{layer}.self_attn.k_proj.weight", (KV * DIM, HIDDEN), KV)
    tensor(f"blk.{i}.attn_v.weight", f"{layer}.self_attn.v_proj.weight", (KV * DIM, HIDDEN), kind=T.Q5_0)
    tensor(f"blk.{i}.attn_output.weight", f"{layer}.self_attn.o_proj.weight", (HIDDEN, HEADS * DIM))
    tensor(f"blk.{i}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight", (HIDDEN,))
    tensor(f"blk.{i}.ffn_gate.weight", f"{layer}.mlp.gate_proj.weight", (INNER, HIDDEN))
    tensor(f"blk.{i}.ffn_up.weight", f"{layer}.mlp.up_proj.weight", (INNER, HIDDEN))
    tensor(f"blk.{i}.ffn_down.weight", f"{layer}.mlp.down_proj.weight", (HIDDEN, INNER))
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
save_file(hf, OUT / "tiny-llama.safetensors")

# --- a plain byte-pair encoding
printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
to_char = {b: chr(b) for b in printable}
to_char |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in printable)}
GPT2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def encode(text, tokens, kinds, merges):
    ids = {token: i for i, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    special = [token for token, kind in zip(tokens, kinds) if kind != 1]
    out = []
    for part in regex.split("(" + "|".join(map(regex.escape, special)) + ")", text):
        if part in special:
            out.append(ids[part])
            continue
        for piece in regex.findall(r"\p{N}|\P{N}+", part):
            for word in GPT2.findall(piece):
                symbols = [to_char[b] for b in word.encode()]
                while len(symbols) > 1:
                    best = min(range(len(symbols) - 1), key=lambda i: ranks.get((symbols[i], symbols[i + 1]), 1 << 30))
                    if (symbols[best], symbols[best + 1]) not in ranks:
                        break
                    symbols[best : best + 2] = [symbols[best] + symbols[best + 1]]
                # A symbol that is no token (only of the cut-down vocabulary) is dropped, as `tokenizers` does without an unknown token.
                out += [ids[symbol] for symbol in symbols if symbol in ids]
    return out


TEXTS = [
    "The capital of France is Paris. It is known for the Eiffel Tower, a landmark built in 1889.",
    "  In 2024, 12345 people said: \"it's  fine\"\n\n\tdon't\r\n  ",
    "<|im_start|>user\nWhat is 3+4?<|im_end|>\n<|im_start|>assistant\n",
    "naïve café – 東京 🙂 Ⅷ ½",
    "def f(x):\n    return x ** 2  # square\n",
    "",
]
json.dump(
    [{"text": t, "smollm2": encode(t, tokens, kinds, merges), "tiny": encode(t, few, kinds[:VOCAB], few_merges)} for t in TEXTS],
    open(OUT / "tokens.json", "w"), indent=0, ensure_ascii=False,
)

# --- SentencePiece
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(open(sys.argv[2]).read().splitlines()), model_writer=model, model_type="bpe", vocab_size=700,
    byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
    allow_whitespace_only_pieces=True, character_coverage=0.999, num_threads=1, minloglevel=2,
)
spm = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
writer = gguf.GGUFWriter(OUT / "sentence-piece.gguf", "llama")
writer.add_tokenizer_model("llama")
writer.add_token_list([spm.id_to_piece(i) for i in range(700)])
writer.add_token_scores([spm.get_score(i) for i in range(700)])
kind = lambda i: 2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1
writer.add_token_types([kind(i) for i in range(700)])
writer.add_unk_token_id(0); writer.add_bos_token_id(1); writer.add_eos_token_id(2)
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
PLAIN = [text for text in TEXTS if "<|" not in text and text] + [" leading", "trailing ", "a" * 30, "the theatre's there"]
json.dump(
    [{"text": t, "ids": [1] + spm.encode(t)} for t in PLAIN], open(OUT / "sentence-piece.json", "w"), indent=0, ensure_ascii=False,
)
