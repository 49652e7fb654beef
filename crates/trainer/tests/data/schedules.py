"""Writes schedules.json: learning rates computed by transformers, for the tests of schedule.rs."""
import json, pathlib
import torch, transformers
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

PEAK, cases = 3e-4, []
for warmup, total in [(0, 1), (0, 10), (3, 10), (10, 10), (7, 40), (12, 10)]:
    for name, make in [
        ("constant", lambda optimizer: get_constant_schedule_with_warmup(optimizer, warmup)),
        ("linear", lambda optimizer: get_linear_schedule_with_warmup(optimizer, warmup, total)),
        ("cosine", lambda optimizer: get_cosine_schedule_with_warmup(optimizer, warmup, total)),
    ]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
        schedule, rates = make(optimizer), []
        for _ in range(total + 3):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        cases.append({"scheduler": name, "peak": PEAK, "warmup_steps": warmup, "total_steps": total, "learning_rates": rates})
path = pathlib.Path(__file__).with_suffix(".json")
path.write_text(json.dumps({"made_by": f"transformers {transformers.__version__}", "cases": cases}, indent=1) + "\n")
