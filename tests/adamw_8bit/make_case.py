#!/usr/bin/env python3
"""Makes case.safetensors: what bitsandbytes 0.50.2 computes with its AdamW8bit on the CPU.

    python3 make_case.py

`param.before [4153]`, `grads [4, 4153]`, and after these four steps `param.after`, the codes `m`, `v` (U8), their `m.absmax`,
`v.absmax [17]` and what codes stand for, `m.quant_map`, `v.quant_map [256]`. The hyperparameters are in the file's metadata.
Gradients have blocks of zeros and outliers, and the last block is ragged. Needs torch, bitsandbytes, safetensors.
"""
import os
import bitsandbytes, torch
from safetensors.torch import save_file

HYPER = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
STEPS, ELEMENTS = 4, 16 * 256 + 57

torch.manual_seed(8)
torch.set_num_threads(1)
before = torch.randn(ELEMENTS) * 0.05
grads = torch.randn(STEPS, ELEMENTS) * torch.logspace(-6, -1, ELEMENTS)
grads[:, 256:512] = 0.0
grads[:, 600::97] *= 1000.0
grads[1:, 1024:1280] = 0.0
param = torch.nn.Parameter(before.clone())
optimizer = bitsandbytes.optim.AdamW8bit([param], **HYPER)
for grad in grads:
    param.grad = grad.clone()
    optimizer.step()
state = optimizer.state[param]
assert state["state1"].dtype == torch.uint8
tensors = {
    "param.before": before, "grads": grads, "param.after": param.detach(),
    "m": state["state1"], "v": state["state2"], "m.absmax": state["absmax1"], "v.absmax": state["absmax2"],
    "m.quant_map": state["qmap1"], "v.quant_map": state["qmap2"],
}
metadata = {"bitsandbytes": bitsandbytes.__version__, **{key: str(value) for key, value in HYPER.items()}}
path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "case.safetensors")
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
