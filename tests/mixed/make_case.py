"""Makes case.safetensors beside this file with PEFT: a batch whose rows have adapters of their own, by the names that
`forward` and `generate` take as `adapter_names`.

Run: python3 make_case.py, with the packages torch, transformers, peft (0.21.2), safetensors.
"""
import pathlib
import peft, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent
PARITY = HERE.parent / "parity"
ADAPTERS = ["__base__", "first", "second"]
ROWS = [1, 1, 2, 0, 2, 1]  # indices into ADAPTERS

model = AutoModelForCausalLM.from_pretrained(PARITY / "linear-rope/base").float()
model = peft.PeftModel.from_pretrained(model, PARITY / "linear-rope/adapter-trained", adapter_name="first")
model.load_adapter(PARITY / "layers-pattern/adapter-trained", adapter_name="second")
model.eval()
torch.manual_seed(7)
tokens = torch.randint(1, model.config.vocab_size, (len(ROWS), 9))
names = [ADAPTERS[row] for row in ROWS]
with torch.no_grad():
    logits = model(input_ids=tokens, adapter_names=names).logits
    answers = model.generate(input_ids=tokens, adapter_names=names, do_sample=False, max_new_tokens=6, pad_token_id=0)
save_file({"adapters": torch.tensor(ROWS, dtype=torch.int32), "tokens": tokens.int(), "logits": logits.contiguous(),
           "answers": answers[:, tokens.shape[1]:].int().contiguous()}, HERE / "case.safetensors")
