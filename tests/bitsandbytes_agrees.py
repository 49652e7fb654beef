#!/usr/bin/env python3
"""A checkpoint that is quantized here loads in transformers with bitsandbytes and gives the same logits there, and so
does an adapter that is trained here on it.

    python3 tests/bitsandbytes_agrees.py --bin target/release/fuselora --model MODEL_DIR --data rows.jsonl

MODEL_DIR is a Hugging Face checkpoint in floats; rows hold `input_ids` and `labels`. Quantizes with and without double
quantization, trains five steps on each, and compares the logits of the first row; exits 1 above 1e-4 relative. Rows of
the projections must be whole blocks of 64: others bitsandbytes 0.50.2 decodes wrongly on CPUs with AVX-512 (a matrix of
160 columns comes back from its own quantization 27 % off, where 9 % is what 4 bits cost). Needs torch, transformers,
peft, bitsandbytes and safetensors.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

BOUND = 1e-4

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--bin", required=True)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True, help="rows with `input_ids` and `labels`")
args = parser.parse_args()
with open(args.data) as rows:
    ids = torch.tensor([json.loads(rows.readline())["input_ids"]])


def fuselora(*words):
    subprocess.run([args.bin, *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def logits(model, *adapter):
    """Ours, of the first row."""
    with tempfile.TemporaryDirectory() as folder:
        dump = os.path.join(folder, "logits.safetensors")
        fuselora("logits", "--model", model, *adapter, "--data", args.data, "--rows", 1, "--output", dump)
        return load_file(dump)["row.0"].double()


def compare(what, ours, theirs):
    error = float((ours - theirs).norm() / theirs.norm())
    print(f"{what}: relative difference of the logits {error:.1e} (bound {BOUND:.0e})")
    return error <= BOUND


agree = True
for name, flags in [("NF4", []), ("NF4 with double quantization", ["--bnb-4bit-use-double-quant"])]:
    with tempfile.TemporaryDirectory() as folder:
        quantized, adapter = os.path.join(folder, "quantized"), os.path.join(folder, "adapter")
        fuselora("quantize", "--model", args.model, "--output", quantized, "--dtype", "f32", *flags)
        fuselora("train", "--model", quantized, "--data", args.data, "--output", adapter, "--steps", 5,
                 "--batch-size", 2, "--learning-rate", 1e-2, "--no-shuffle")
        # For inference bitsandbytes repacks weights on a CPU, and takes only some extents there.
        model = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32).train()
        # A model that transformers had dequantized would agree without proving anything.
        projections = [module for module in model.modules() if isinstance(module, Linear4bit)]
        assert projections, "nothing is in 4 bits there"
        assert all(module.in_features % 64 == 0 for module in projections), "rows are not whole blocks"
        with torch.no_grad():
            base = model(input_ids=ids).logits[0].double()
            adapted = PeftModel.from_pretrained(model, adapter).train()(input_ids=ids).logits[0].double()
        agree &= compare(name, logits(quantized), base)
        agree &= compare(f"{name}, adapted", logits(quantized, "--adapter", adapter), adapted)
        moved = float((base - adapted).norm() / base.norm())
        print(f"{name}: the adapter moved them by {moved:.1e}")
        agree &= moved > 10 * BOUND
sys.exit(not agree)
