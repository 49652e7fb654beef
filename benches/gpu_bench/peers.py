#!/usr/bin/env python3
"""What PyTorch and PEFT take for the operations in this folder's *.json, on the same GPU.

    python3 peers.py [--quick] [--device cuda]

Writes peers.json: the ceilings (a large copy, large products) and, for a row of the same name and shape, the
peers' times. Median of batches between two events; several sets of tensors take turns.
"""

import argparse
import glob
import json
import statistics
import sys
import time

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

CACHED = 128 << 20  # bytes
WARM_UP = 0.2  # seconds
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Clock:
    """Times calls on a device, each call of a list on tensors of its own."""

    def __init__(self, device, seconds):
        self.device, self.seconds = device, seconds

    def between_events(self, work):
        if self.device == "cpu":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def median(self, calls):
        def rounds(n):
            for _ in range(n):
                for call in calls:
                    call()

        rounds(2)
        once = self.between_events(lambda: rounds(1))
        # As gpu_bench does: clocks that the limit of power lets the GPU keep.
        rounds(int(WARM_UP / once) if self.device != "cpu" else 0)
        # A batch is long beside a launch.
        n = max(1, min(50, int(self.seconds / 10 / once)))
        batches = max(3, min(30, int(self.seconds / (n * once))))
        times = [self.between_events(lambda: rounds(n)) for _ in range(batches)]
        return statistics.median(times) / (n * len(calls))


def random(device, dtype, *shape):
    return torch.rand(shape, device=device, dtype=dtype) * 2 - 1


def frozen_forward(device, dtype, shape):
    """y = x W^T by the library's product."""
    tokens, inputs, outputs, _ = shape
    x, w = random(device, dtype, tokens, inputs), random(device, dtype, outputs, inputs)
    return {"cuBLAS": lambda: x @ w.T}


def frozen_dx(device, dtype, shape):
    tokens, inputs, outputs, _ = shape
    dy, w = random(device, dtype, tokens, outputs), random(device, dtype, outputs, inputs)
    return {"cuBLAS": lambda: dy @ w}


class LoraLayer:
    """A layer as PEFT makes it: the weight in `dtype`, the adapter in f32."""

    def __init__(self, device, dtype, shape):
        from peft import LoraConfig, get_peft_model

        tokens, inputs, outputs, rank = shape
        model = nn.Sequential()
        model.add_module("linear", nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype))
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=["linear"]))
        self.layer = model.base_model.model.linear
        self.factors = [self.layer.lora_A["default"].weight, self.layer.lora_B["default"].weight]
        nn.init.uniform_(self.factors[1])
        self.x = random(device, dtype, tokens, inputs).requires_grad_()
        self.dy = random(device, dtype, tokens, outputs)
        self.autocast = lambda: torch.autocast(device, dtype)

    def gradients(self, y, **options):
        torch.autograd.grad(y, [self.x, *self.factors], self.dy, **options)


def lora_forward(device, dtype, shape):
    own = LoraLayer(device, dtype, shape)

    def autocast():
        with own.autocast():
            own.layer(own.x)

    peers = {"PEFT": lambda: own.layer(own.x)}
    return peers | ({"PEFT, autocast": autocast} if dtype != torch.float32 else {})


def lora_backward(device, dtype, shape):
    own = LoraLayer(device, dtype, shape)
    y = own.layer(own.x)
    return {"PEFT": lambda: own.gradients(y, retain_graph=True)}


def lora_forward_backward(device, dtype, shape):
    own = LoraLayer(device, dtype, shape)

    def autocast():
        with own.autocast():
            y = own.layer(own.x)
        own.gradients(y)

    peers = {"PEFT": lambda: own.gradients(own.layer(own.x))}
    return peers | ({"PEFT, autocast": autocast} if dtype != torch.float32 else {})


def compiled(device, dtype, shape):
    """The layer through torch.compile, forward and with its backward; under autocast, as trainers run it."""
    own = LoraLayer(device, dtype, shape)
    layer = torch.compile(own.layer)

    def forward():
        with own.autocast():
            return layer(own.x)

    return {
        "lora_linear forward": forward,
        "lora_linear forward and backward": lambda: own.gradients(forward()),
    }


def attention(device, dtype, shape):
    """SDPA on tensors laid out as ours: FlashAttention, which knows no f32; there the memory-efficient kernel."""
    sequences, seqlen, heads, kv_heads, head_dim = shape
    flash = dtype != torch.float32
    kv_heads = kv_heads if flash else heads  # only flash knows groups of heads
    q, k, v = (random(device, dtype, sequences, seqlen, n, head_dim).transpose(1, 2).requires_grad_() for n in (heads, kv_heads, kv_heads))
    backend = SDPBackend.FLASH_ATTENTION if flash else SDPBackend.EFFICIENT_ATTENTION

    def run():
        with sdpa_kernel(backend if device != "cpu" else SDPBackend.MATH):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=flash)

    return "SDPA, flash" if flash else "SDPA, efficient", (q, k, v), run


def attention_forward(device, dtype, shape):
    name, _, run = attention(device, dtype, shape)
    return {name: run}


def attention_backward(device, dtype, shape):
    name, inputs, run = attention(device, dtype, shape)
    o = run()
    d_o = torch.rand_like(o)
    return {name: lambda: torch.autograd.grad(o, inputs, d_o, retain_graph=True)}


def copy_of(device, size):
    """A copy that reads and writes as many bytes as an operation does."""
    source, target = (torch.randint(256, (size // 2,), device=device, dtype=torch.uint8) for _ in range(2))
    return {"a copy of as many bytes": lambda: target.copy_(source)}


# Of small tensors a copy, too, does not reach the rate of a large one.
COPIES = ("nf4 dequantize", "nf4 dequantize, nested")
PEERS = {
    "frozen product forward": frozen_forward,
    "frozen product dx": frozen_dx,
    "lora_linear forward": lora_forward,
    "lora_linear backward": lora_backward,
    "lora_linear forward and backward": lora_forward_backward,
    "attention forward": attention_forward,
    "attention backward": attention_backward,
}
# Only of one row each: compiling takes many seconds.
COMPILED = ("lora_linear forward and backward", "bf16")


def ceilings(clock, device, size):
    """A large copy, bytes read and written per second, and large products, operations per second."""
    source, target = (torch.randint(256, (size**2 * 16,), device=device, dtype=torch.uint8) for _ in range(2))
    found = [{"ceiling": "copy", "per_s": 2 * source.numel() / clock.median([lambda: target.copy_(source)])}]
    for name, dtype in DTYPES.items():
        a, b = random(device, dtype, size, size), random(device, dtype, size, size)
        found.append({"ceiling": "matmul", "dtype": name, "per_s": 2 * size**3 / clock.median([lambda: a @ b])})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    rows = [row for path in sorted(glob.glob("*.json")) for row in json.load(open(path)) if "group" in row]
    clock = Clock(args.device, 0.06 if args.quick else 0.2)
    torch.manual_seed(0)
    found = []

    def measure(name, row, make):
        """Times each peer of a row; `make` prepares calls, by the peers' names."""
        entry = {"name": name, "shape": row["shape"], "dtype": row["dtype"]}
        try:
            # As many sets of tensors as it takes that none is left in the second-level cache when its turn comes.
            count = max(2, -(-CACHED // row["bytes"]))
            sets = [make(args.device, DTYPES[row["dtype"]], row["shape"]) for _ in range(count)]
            for peer in sets[0]:
                found.append(entry | {"peer": peer, "seconds": clock.median([calls[peer] for calls in sets])})
                print(f"{1e6 * found[-1]['seconds']:10.1f} us  {name} {row['shape']} {row['dtype']}: {peer}", flush=True)
        except Exception as error:  # noqa: BLE001 - a peer that fails leaves the others
            found.append(entry | {"peer": "PyTorch", "error": str(error).splitlines()[0]})
            print(f"{name} {row['shape']} {row['dtype']}: {error}", file=sys.stderr, flush=True)
        write(found)

    found += ceilings(clock, args.device, 8192 if args.device != "cpu" else 64)
    for ceiling in found:
        print(f"{ceiling['per_s']:12.4g} /s  {ceiling['ceiling']} {ceiling.get('dtype', '')}", flush=True)
    for row in rows:
        name = row["name"]
        if name in PEERS:
            measure(name, row, PEERS[name])
        elif name in COPIES:
            measure(name, row, lambda device, *_, size=row["bytes"]: copy_of(device, size))
    for row in [row for row in rows if (row["name"], row["dtype"]) == COMPILED][:1]:
        own = compiled(args.device, DTYPES[row["dtype"]], row["shape"])
        for name, call in own.items():
            measure(name, row, lambda *_, call=call: {"PEFT, compiled": call})


def write(found):
    with open("peers.json", "w") as file:
        json.dump(found, file, indent=1)


main()
