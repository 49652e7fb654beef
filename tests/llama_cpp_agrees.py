#!/usr/bin/env python3
"""llama.cpp computes with an adapter that is converted here what PEFT computes with it.

    python3 tests/llama_cpp_agrees.py --bin target/release/fuselora

For cases of tests/parity writes the base as a GGUF model, by llama.cpp's own package, converts the trained adapter, and
compares llama.cpp's logits of the first row with PEFT's, with and without the adapter; exits 1 above 2e-3 relative. llama.cpp
keeps keys and values in f16, so that the base alone differs by some 1e-4. Needs numpy, safetensors, gguf and
llama-cpp-python (0.3.36).
"""

import argparse
import ctypes
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import gguf
import llama_cpp
import numpy as np
from safetensors.numpy import load_file

BOUND = 2e-3
PARITY = pathlib.Path(__file__).parent / "parity"
CASES = [
    ("layers-pattern", "llama", gguf.MODEL_ARCH.LLAMA),
    ("lora-embedding", "llama", gguf.MODEL_ARCH.LLAMA),
    ("qwen3", "qwen3", gguf.MODEL_ARCH.QWEN3),
]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--bin", required=True)
args = parser.parse_args()


def permute(rows, heads):
    """The rows of each head from rotary halves to neighbouring pairs."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_base(folder, architecture, tensors, path):
    config = json.loads((folder / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    head_dim = config.get("head_dim") or config["hidden_size"] // heads["q_proj"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(tensors, config["num_hidden_layers"])
    for name, values in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        part = module.rsplit(".", 1)[-1]
        if architecture == "llama" and part in heads:
            values = permute(values, heads[part])
        writer.add_tensor(f"{names.get_name(module)}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config["vocab_size"]


def logits(model_path, adapter_path, ids, vocab):
    model = llama_cpp.llama_load_model_from_file(model_path.encode(), llama_cpp.llama_model_default_params())
    context = llama_cpp.llama_new_context_with_model(model, llama_cpp.llama_context_default_params())
    if adapter_path:
        adapter = llama_cpp.llama_adapter_lora_init(model, adapter_path.encode())
        assert adapter, "llama.cpp does not take the adapter"
        adapters = (ctypes.c_void_p * 1)(ctypes.cast(adapter, ctypes.c_void_p))
        adapters = ctypes.cast(adapters, ctypes.POINTER(type(adapter)))
        llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0))
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for position, token in enumerate(ids):
        batch.token[position], batch.pos[position] = token, position
        batch.n_seq_id[position], batch.seq_id[position][0], batch.logits[position] = 1, 0, 1
    assert llama_cpp.llama_decode(context, batch) == 0
    row = lambda i: np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), shape=(vocab,)).copy()
    return np.stack([row(i) for i in range(len(ids))])


quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(quiet, None)
agree = True
for case, architecture, tensors in CASES:
    folder = PARITY / case
    ids = json.loads((folder / "train.jsonl").read_text().splitlines()[0])["input_ids"]
    expected = load_file(folder / "expected-logits.safetensors")
    with tempfile.TemporaryDirectory() as temporary:
        base, adapter = os.path.join(temporary, "base.gguf"), os.path.join(temporary, "adapter.gguf")
        vocab = write_base(folder / "base", architecture, tensors, base)
        subprocess.run([args.bin, "adapter", "convert", "--model", folder / "base", "--adapter", folder / "adapter-trained",
                        "--to", "gguf", "--output", adapter], check=True, stdout=subprocess.DEVNULL)
        for what, path, key in [("base", None, "base_logits_probe"), ("adapted", adapter, "trained_logits_probe")]:
            found = logits(base, path, ids, vocab)
            error = float(np.linalg.norm(found - expected[key]) / np.linalg.norm(expected[key]))
            print(f"{case}, {what}: relative difference of the logits {error:.1e} (bound {BOUND:.0e})")
            agree &= error <= BOUND
sys.exit(not agree)
