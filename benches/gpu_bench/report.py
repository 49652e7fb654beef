#!/usr/bin/env python3
"""Merges this folder's *.json into report.md: tables for BENCHMARKS.md.

    python3 report.py [--quick]
"""

import datetime
import glob
import json
import subprocess
import sys


def load(name):
    try:
        return json.load(open(name))
    except FileNotFoundError:
        return []


def gpu():
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        name, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
        return f"{name}, driver {driver}"
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        return "unknown GPU"


def versions():
    try:
        import peft, torch, transformers  # noqa: E401
    except ImportError:
        return "without PyTorch"
    return f"torch {torch.__version__}, transformers {transformers.__version__}, PEFT {peft.__version__}"


def copy_rate(rows, peers):
    """Bytes read and written per second by the faster of the driver's copy and PyTorch's, if either was measured."""
    driver = [row["bytes"] / row["seconds"] for row in rows if row["name"] == "copy" and "seconds" in row]
    return max(driver + [peer["per_s"] for peer in peers if peer.get("ceiling") == "copy"], default=None)


def kernel_table(rows, peers):
    copy = copy_rate(rows, peers)
    matmul = {peer["dtype"]: peer["per_s"] for peer in peers if peer.get("ceiling") == "matmul"}
    yield "| operation | shape | dtype | us | TFLOP/s | GB/s | of the ceiling | ours is |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        head = f"| {row['name']} | {shape} | {row['dtype']} |"
        if "error" in row:
            yield f"{head} {row['error']} | | | | |"
            continue
        seconds = row["seconds"]
        # The least time that this card's memory and matrix units allow.
        least = [row["bytes"] / copy if copy else 0, row["flops"] / matmul[row["dtype"]] if matmul.get(row["dtype"]) and row["flops"] else 0]
        ceiling = f"{max(least) / seconds:.2f} ({'memory' if least[0] > least[1] else 'products'})" if any(least) else ""
        beside = [
            f"{peer['seconds'] / seconds:.2f} x {peer['peer']}" if "seconds" in peer else f"{peer['peer']}: {peer['error']}"
            for peer in peers
            if (peer.get("name"), peer.get("shape"), peer.get("dtype")) == (row["name"], row["shape"], row["dtype"])
        ]
        tflops = f"{row['flops'] / seconds / 1e12:.1f}" if row["flops"] else ""
        yield f"{head} {1e6 * seconds:.1f} | {tflops} | {row['bytes'] / seconds / 1e9:.0f} | {ceiling} | {', '.join(beside)} |"


def training_table(rows):
    yield "| who | batch | dtype | tokens/s | peak, GB | fuselora is |"
    yield "| --- | --- | --- | --- | --- | --- |"
    ours = {(row["batch_size"], row["seqlen"]): row for row in reversed(rows) if row["who"] == "fuselora" and "tokens_per_s" in row}
    for row in rows:
        batch = f"{row.get('batch_size', '')} x {row.get('seqlen', '')}"
        head = f"| {row['who']} | {batch} | {row.get('dtype', '')} |"
        if "error" in row:
            yield f"{head} {row['error']} | | |"
            continue
        own = ours.get((row["batch_size"], row["seqlen"]))
        beside = ""
        if own and row["who"] != "fuselora":
            memory = own["peak_bytes"] / row["peak_bytes"] if row["peak_bytes"] else 0
            beside = f"{own['tokens_per_s'] / row['tokens_per_s']:.2f} x as fast in {own['dtype']}, {memory:.2f} x its memory"
        yield f"{head} {row['tokens_per_s']:.0f} | {row['peak_bytes'] / 1e9:.2f} | {beside} |"


def main():
    peers, training = load("peers.json"), load("training.json")
    rows = [row for name in sorted(glob.glob("*.json")) for row in load(name) if "group" in row]
    lines = [
        f"**{gpu()}**, {datetime.date.today()}; {versions()}; `cargo xtask gpu-bench{' --quick' if '--quick' in sys.argv else ''}`.",
        "",
    ]
    copy = copy_rate(rows, peers)
    if copy:
        lines.append(f"Ceilings measured in this run: a copy {copy / 1e9:.0f} GB/s (read and written);")
    for peer in peers:
        if peer.get("ceiling") == "matmul":
            lines.append(f"a product of 8192 x 8192 x 8192 in {peer['dtype']} {peer['per_s'] / 1e12:.0f} TFLOP/s;")
    lines += ["", *kernel_table(rows, peers), "", *training_table(training), ""]
    with open("report.md", "w") as file:
        file.write("\n".join(lines))
    print("\n".join(lines))


main()
