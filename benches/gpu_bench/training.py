#!/usr/bin/env python3
"""Whole training steps on this GPU: `./fuselora train` beside PEFT on PyTorch.

    python3 training.py [--quick] [--device cuda]

A model with the shape of Llama 3.2 1B and random weights, LoRA of rank 16 on all linear layers, AdamW, no
gradient checkpointing, rows of random tokens that are all targets. Writes training.json: tokens per second of
the median step, and the most memory of tensors.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time

WORKLOADS = [(4, 1024), (1, 2048)]
RANK = 16
# Steps that are not counted: they load kernels and fill the pools.
WARM_UP = 3
LLAMA_1B = {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 8192}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 500, "max_position_embeddings": 64}


def train_peft(model_folder, device, workloads, steps):
    """In a process of its own: makes the checkpoint, trains on it, prints a JSON line for each workload."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**(LLAMA_1B if device != "cpu" else TINY), tie_word_embeddings=True)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base.save_pretrained(model_folder)
    targets = "all-linear"
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=targets))
    model.config.use_cache = False
    trained = [p for p in model.parameters() if p.requires_grad]
    for peer, autocast in [("PEFT", False), ("PEFT, autocast", True)]:
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        for batch_size, seqlen in workloads:
            entry = {"who": peer, "batch_size": batch_size, "seqlen": seqlen, "dtype": "bf16"}
            try:
                if device != "cpu":
                    torch.cuda.reset_peak_memory_stats()
                seconds = []
                for _ in range(WARM_UP + steps):
                    ids = torch.randint(config.vocab_size, (batch_size, seqlen), device=device)
                    synchronize(torch, device)
                    start = time.perf_counter()
                    with torch.autocast(device, torch.bfloat16, enabled=autocast):
                        loss = model(input_ids=ids, labels=ids).loss
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(trained, 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    synchronize(torch, device)
                    seconds.append(time.perf_counter() - start)
                entry["tokens_per_s"] = batch_size * seqlen / statistics.median(seconds[WARM_UP:])
                entry["peak_bytes"] = torch.cuda.max_memory_allocated() if device != "cpu" else 0
            except Exception as error:  # noqa: BLE001 - one that fails leaves the others
                entry["error"] = str(error).splitlines()[0]
            print(json.dumps(entry), flush=True)


def synchronize(torch, device):
    if device != "cpu":
        torch.cuda.synchronize()


def train_fuselora(model_folder, device, workload, steps, dtype):
    batch_size, seqlen = workload
    entry = {"who": "fuselora", "batch_size": batch_size, "seqlen": seqlen, "dtype": dtype}
    vocab_size = json.load(open(os.path.join(model_folder, "config.json")))["vocab_size"]
    chance = random.Random(0)
    with open("rows.jsonl", "w") as file:
        for _ in range(batch_size * (WARM_UP + steps)):
            ids = [chance.randrange(vocab_size) for _ in range(seqlen)]
            file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    shutil.rmtree("adapter", ignore_errors=True)
    words = ["./fuselora", "train", "--model", model_folder, "--data", "rows.jsonl", "--output", "adapter",
             "--steps", str(WARM_UP + steps), "--batch-size", str(batch_size), "--rank", str(RANK),
             "--lora-alpha", str(2 * RANK), "--learning-rate", "1e-4", "--device", device, "--dtype", dtype]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        return entry | {"error": (done.stderr.strip().splitlines() or ["no word"])[-1]}
    lines = [json.loads(line) for line in open("adapter/metrics.jsonl")]
    steps = [line for line in lines if "loss" in line]
    return entry | {
        "tokens_per_s": statistics.median(line["tokens_per_s"] for line in steps[WARM_UP:]),
        "peak_bytes": steps[-1]["peak_memory_bytes"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peft", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    workloads = WORKLOADS if not args.quick else WORKLOADS[:1]
    steps = 10 if not args.quick else 5
    if args.device == "cpu":
        workloads, steps = [(2, 16)], 2
    if args.peft:
        return train_peft("model", args.device, workloads, steps)

    found = []

    def tell(entry):
        found.append(entry)
        print(entry, flush=True)
        with open("training.json", "w") as file:
            json.dump(found, file, indent=1)

    words = [sys.executable, __file__, "--peft", "--device", args.device] + ["--quick"] * args.quick
    peft = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    for line in peft.stdout:
        if line.startswith("{"):
            tell(json.loads(line))
    if peft.wait():
        tell({"who": "PEFT", "error": "it ended early: its words are above"})
    for workload in workloads:
        for dtype in ["bf16", "f32"]:
            tell(train_fuselora("model", args.device, workload, steps, dtype))


main()
