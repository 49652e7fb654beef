#!/usr/bin/env python3
"""An adapter trained here loads in Hugging Face PEFT and gives the same logits there.

    python3 tests/peft_agrees.py --bin target/release/fuselora --model MODEL_DIR --data rows.jsonl

MODEL_DIR is a Hugging Face checkpoint; rows hold `input_ids` and `labels`. Trains five steps,
loads the adapter with PEFT, and compares the logits of the first row; exits 1 above 1e-4 relative.
Needs torch, transformers, peft and safetensors.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

BOUND = 1e-4

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--bin", required=True)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True, help="rows with `input_ids` and `labels`")
args = parser.parse_args()


def fuselora(*words):
    subprocess.run([args.bin, *map(str, words)], check=True, stdout=subprocess.DEVNULL)


with tempfile.TemporaryDirectory() as folder:
    adapter, dump = os.path.join(folder, "adapter"), os.path.join(folder, "logits.safetensors")
    fuselora("train", "--model", args.model, "--data", args.data, "--output", adapter,
             "--steps", 5, "--batch-size", 2, "--learning-rate", 1e-2, "--no-shuffle")
    fuselora("logits", "--model", args.model, "--adapter", adapter, "--data", args.data, "--output", dump)
    ours = load_file(dump)["row.0"].double()

    with open(args.data) as rows:
        ids = torch.tensor([json.loads(rows.readline())["input_ids"]])
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    with torch.no_grad():
        before = base(input_ids=ids).logits[0].double()
        theirs = PeftModel.from_pretrained(base, adapter)(input_ids=ids).logits[0].double()

error = float((ours - theirs).norm() / theirs.norm())
moved = float((before - theirs).norm() / before.norm())
print(f"relative difference of the logits: {error:.1e} (bound {BOUND:.0e}); the adapter moved them by {moved:.1e}")
# An adapter that changes nothing would agree without proving anything.
sys.exit(error > BOUND or moved < 10 * BOUND)
