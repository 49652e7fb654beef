"""Makes the combinations beside this file with PEFT's `add_weighted_adapter`: two adapters of tests/parity, one of which
has a layer's modules alone, each with a weight of its own.

Run: python3 make_cases.py, with the packages torch, transformers, peft (0.21.2), safetensors.
"""
import pathlib, shutil
import peft
from transformers import AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent
PARITY = HERE.parent / "parity"

model = AutoModelForCausalLM.from_pretrained(PARITY / "linear-rope/base").float()
model = peft.PeftModel.from_pretrained(model, PARITY / "linear-rope/adapter-trained", adapter_name="first")
model.load_adapter(PARITY / "layers-pattern/adapter-trained", adapter_name="second")
for kind, options in [("linear", {}), ("cat", {}), ("svd", dict(svd_rank=5))]:
    shutil.rmtree(HERE / kind, ignore_errors=True)
    model.add_weighted_adapter(["first", "second"], [0.75, -1.5], kind, combination_type=kind, **options)
    model.save_pretrained(HERE, selected_adapters=[kind])
(HERE / "README.md").unlink(missing_ok=True)
for readme in HERE.glob("*/README.md"):
    readme.unlink()
