#!/usr/bin/env python3
"""LoRA and QLoRA training on this CPU: fuselora beside Hugging Face PEFT on PyTorch, in one run.

    cargo xtask bench-cpu [--mode lora|qlora] [--rounds 2] [--steps 6]    (runs this file; PYTHON names the interpreter)

SmolLM2-135M in f32, r = 8, alpha = 16, all linear layers, AdamW, batches of 4 rows. Two workloads: 256
random tokens a row, all of them targets; and the demo's rows, whose completions are the targets, which
PEFT pads to the longest of a batch. Three contenders take turns each round: fuselora, PEFT as installed,
and PEFT with glibc's allocator told to keep its memory. Rates are tokens that are not padding per second,
the median step of a run without its first; printed are medians over the rounds, and ratios to fuselora.
With --mode qlora each quantizes the base to NF4 with double quantization as it loads it, PEFT by bitsandbytes,
and fuselora's LoRA in f32 is a fourth contender.

Needs torch, transformers and peft, for qlora bitsandbytes, and both cores to itself: PyTorch slows tenfold when it loses one.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile

BATCH_SIZE, SEQLEN = 4, 256
FUSELORA_QLORA = ["--load-in-4bit", "--bnb-4bit-use-double-quant"]
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36), "MALLOC_TOP_PAD_": str(1 << 28)}


def peer(mode, model, data, steps):
    """Trains with PEFT in this process and prints one JSON line."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import resource
    import time
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    options = {}
    if mode == "qlora":
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                 bnb_4bit_compute_dtype=torch.float32)
        options = {"device_map": {"": "cpu"}, "quantization_config": nf4}
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rows = [json.loads(line) for line in open(data)]
    rates = []
    for step in range(steps):
        batch = [rows[(step * BATCH_SIZE + i) % len(rows)] for i in range(BATCH_SIZE)]
        longest = max(len(row["input_ids"]) for row in batch)
        shape = (len(batch), longest)
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, -100)
        for i, row in enumerate(batch):
            n = len(row["input_ids"])
            ids[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"]), 1
        start = time.perf_counter()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.append(int(mask.sum()) / (time.perf_counter() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"tokens_per_s": statistics.median(rates[1:]), "peak_mib": peak}))


def run_peer(mode, model, data, steps, environment):
    words = [sys.executable, os.path.abspath(__file__), "--peer", "--mode", mode, "--model", model, "--data", data,
             "--steps", str(steps)]
    done = subprocess.run(words, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_fuselora(program, model, data, steps, options):
    with tempfile.TemporaryDirectory() as output:
        words = [program, "train", "--model", model, "--data", data, "--output", output, "--steps", str(steps),
                 "--batch-size", str(BATCH_SIZE), "--rank", "8", "--lora-alpha", "16", "--learning-rate", "1e-4",
                 "--lr-scheduler", "constant", "--no-shuffle", *options]
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            sys.exit(f"{' '.join(words)}: status {status}")
        lines = [json.loads(line) for line in open(os.path.join(output, "metrics.jsonl"))]
        rates = [line["tokens_per_s"] for line in lines if "loss" in line]
        return {"tokens_per_s": statistics.median(rates[1:]), "peak_mib": usage.ru_maxrss / 1024}


def random_rows(path, count, vocab_size):
    chance = random.Random(0)
    with open(path, "w") as file:
        for _ in range(count):
            ids = [chance.randrange(vocab_size) for _ in range(SEQLEN)]
            file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")


def demo_rows(path, source, model, count):
    """The demo's rows through the model's chat template; only the answers are targets."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(model)
    with open(path, "w") as file, open(source) as rows:
        for _, line in zip(range(count), rows):
            row = json.loads(line)
            turns = [{"role": "user", "content": row["prompt"]}]
            prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            turns.append({"role": "assistant", "content": row["completion"]})
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            given = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            file.write(json.dumps({"input_ids": ids, "labels": [-100] * given + ids[given:]}) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", help="the fuselora program")
    parser.add_argument("--model", required=True, help="a Hugging Face checkpoint")
    parser.add_argument("--demo-data", help="train.jsonl with `prompt` and `completion`")
    parser.add_argument("--mode", choices=["lora", "qlora"], default="lora")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer(args.mode, args.model, args.data, args.steps)

    with tempfile.TemporaryDirectory() as folder:
        count = BATCH_SIZE * args.steps
        vocab_size = json.load(open(os.path.join(args.model, "config.json")))["vocab_size"]
        workloads = {name: os.path.join(folder, f"{i}.jsonl") for i, name in enumerate(["4 x 256 tokens", "demo rows"])}
        random_rows(workloads["4 x 256 tokens"], count, vocab_size)
        demo_rows(workloads["demo rows"], args.demo_data, args.model, count)
        for workload, data in workloads.items():
            ours = lambda options: run_fuselora(args.bin, args.model, data, args.steps, options)
            peers = lambda environment: run_peer(args.mode, args.model, data, args.steps, environment)
            contenders = {
                "fuselora": lambda: ours(FUSELORA_QLORA if args.mode == "qlora" else []),
                "PEFT": lambda: peers({}),
                "PEFT, allocator tuned": lambda: peers(TUNED),
            }
            if args.mode == "qlora":
                contenders["fuselora, LoRA in f32"] = lambda: ours([])
            runs = {name: [] for name in contenders}
            for _ in range(args.rounds):
                for name, contender in contenders.items():
                    runs[name].append(contender())
            median = {
                name: {key: statistics.median(run[key] for run in all_runs) for key in ("tokens_per_s", "peak_mib")}
                for name, all_runs in runs.items()
            }
            first = median["fuselora"]
            print(f"{workload}\n  {'':24}{'tokens/s':>10}{'MiB':>8}{'fuselora is':>14}{'memory':>9}")
            for name, figures in median.items():
                speed, memory = (first[k] / figures[k] for k in ("tokens_per_s", "peak_mib"))
                print(f"  {name:24}{figures['tokens_per_s']:10.0f}{figures['peak_mib']:8.0f}{speed:12.2f} x{memory:7.2f} x", flush=True)


main()
