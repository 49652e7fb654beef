"""Makes the cases beside this file with transformers and PEFT, float32 on the CPU: what an adapter's options and a
family's mathematics come to, so that ours is held against something else than our own reading.

Run: python3 make_cases.py [NAME ...], with the packages torch, transformers, peft (0.21.2), safetensors, numpy; for
`loftq` bitsandbytes and scipy.
Each folder has `base/`, `adapter-initial/`, `adapter-trained/`, `train.jsonl`, `expected.json` and
`expected-*.safetensors`; tests/peft_parity.rs of the transformer crate reads them.
"""
import inspect, json, pathlib, shutil, sys
import numpy as np, torch, transformers, peft
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

HERE = pathlib.Path(__file__).parent
VOCAB, STEPS, BATCH, LR, SEED = 64, 5, 4, 3e-3, 42
SIZES = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.15, bos_token_id=None, eos_token_id=None)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rope(**parameters):
    return dict(rope_parameters={"rope_theta": 10000.0, **parameters})


def llama(**more):
    return LlamaConfig(**{**SIZES, **more})


def gpt2(**more):
    return GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.15, resid_pdrop=0.0,
                      embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, **more)


def lora(**options):
    return {**dict(r=4, lora_alpha=8, target_modules=LINEAR), **options}


# PEFT merges into a matrix that head and embedding share; ours parts them, so that each gets its own.
TIED = dict(shared_matrix=True)
GPT2 = dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
CASES = {
    "llama3-rope": (llama(**rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                 original_max_position_embeddings=16)), lora()),
    "linear-rope": (llama(**rope(rope_type="linear", factor=4.0)), lora()),
    # Rows longer than the trained positions, all of one length: transformers' frequencies depend on what came before.
    "dynamic-rope": (llama(**rope(rope_type="dynamic", factor=3.0)), lora(), dict(length=24, trained_positions=16)),
    "mistral-window": (MistralConfig(**SIZES, sliding_window=6), lora()),
    "qwen3": (Qwen3Config(**SIZES, head_dim=16), lora()),
    "gpt2-dora": (gpt2(), lora(**GPT2, use_dora=True)),
    "dora-dropout": (llama(), lora(use_dora=True, lora_dropout=0.25), dict(length=12)),
    "layers-pattern": (llama(), lora(layers_to_transform=[1], layers_pattern="layers")),
    "bias-lora-only": (Qwen2Config(**SIZES), lora(target_modules=["q_proj", "o_proj", "up_proj"], bias="lora_only")),
    "gpt2-bias-all": (gpt2(), lora(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True, bias="all")),
    "bias-dora-dropout": (Qwen2Config(**SIZES), lora(bias="all", use_dora=True, lora_dropout=0.25), dict(length=12)),
    "lora-bias": (llama(attention_bias=True, mlp_bias=True), lora(target_modules=["q_proj", "v_proj", "up_proj"], bias="lora_only", lora_bias=True)),
    "modules-to-save": (llama(), lora(target_modules=["q_proj", "v_proj"], modules_to_save=["norm", "embed_tokens", "lm_head", "0.mlp"])),
    "modules-to-save-tied": (Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True), lora(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head", "k_norm"]), TIED),
    "gpt2-modules-to-save": (gpt2(), lora(target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["wte", "wpe", "ln_f"]), TIED),
    "lora-embedding": (llama(), lora(target_modules=["q_proj", "embed_tokens", "lm_head"], use_rslora=True)),
    "lora-embedding-tied": (Qwen2Config(**SIZES, tie_word_embeddings=True), lora(target_modules=["v_proj", "embed_tokens"]), TIED),
    "lora-head-tied": (Qwen2Config(**SIZES, tie_word_embeddings=True), lora(target_modules=["v_proj", "lm_head"]), TIED),
    "gpt2-lora-embedding": (gpt2(), lora(target_modules=["c_attn", "wte", "wpe"], fan_in_fan_out=True), TIED),
    "trainable-tokens": (llama(), lora(target_modules=["q_proj", "v_proj"], trainable_token_indices={"embed_tokens": [3, 7, 11], "lm_head": [5, 7]})),
    "trainable-tokens-tied": (Qwen2Config(**SIZES, tie_word_embeddings=True), lora(target_modules=["q_proj", "v_proj"], trainable_token_indices=[2, 3, 5, 8, 13])),
    "pissa": (llama(), lora(init_lora_weights="pissa", rank_pattern={"down_proj": 6})),
    "gpt2-pissa": (gpt2(), lora(**GPT2, init_lora_weights="pissa")),
    "olora": (llama(), lora(init_lora_weights="olora")),
    # Rows of whole blocks: bitsandbytes' AVX-512 code reads others wrong (docs/quantization.md).
    "loftq": (llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1), lora(init_lora_weights="loftq", loftq_config=dict(loftq_bits=4, loftq_iter=2))),
    "loraplus": (Qwen2Config(**SIZES), lora(target_modules=["q_proj", "down_proj", "embed_tokens"], bias="lora_only", use_dora=False,
                 modules_to_save=["model.norm"]), dict(loraplus=dict(loraplus_lr_ratio=8.0, loraplus_lr_embedding=1e-3, loraplus_weight_decay=0.1))),
    "gpt2-loraplus": (gpt2(), lora(**GPT2, use_dora=True, modules_to_save=["ln_f"]), dict(loraplus=dict(loraplus_lr_ratio=4.0, loraplus_weight_decay=0.2))),
}


def on_the_cpu(function):
    """PEFT's function, which asks for a GPU by name."""
    names = dict(inspect.unwrap(function).__globals__)
    source = inspect.getsource(inspect.unwrap(function)).replace('else "cuda"', 'else "cpu"')
    exec(source, names)
    return names[function.__name__]


peft.tuners.lora.layer.loftq_init = on_the_cpu(peft.tuners.lora.layer.loftq_init)


def name_in_file(name):
    for part in (".modules_to_save.default", ".default"):
        name = name.replace(part, "")
    return name.replace("magnitude_vector.weight", "magnitude_vector")


def philox(key, counter):
    """Philox4x32-10 over arrays of counters `[n, 4]`."""
    c = [counter[:, i].astype(np.uint64) for i in range(4)]
    k = [np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32)]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k[0], p1 & low, (p0 >> np.uint64(32)) ^ c[3] ^ k[1], p0 & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(c, 1)


class Mask(torch.nn.Module):
    """Dropout with the masks that ours draws, for rows of one length."""

    def __init__(self, probability, stream, step):
        super().__init__()
        self.probability, self.stream, self.step = probability, stream, step

    def forward(self, x):
        if not self.training:
            return x
        n = x.numel()
        groups = np.arange((n + 3) // 4)
        counter = np.stack([groups, groups * 0, groups * 0 + self.stream, groups * 0 + self.step[0]], 1)
        uniform = (philox(SEED, counter).reshape(-1)[:n] >> np.uint64(8)).astype(np.float32) * np.float32(2**-24)
        keep = torch.from_numpy(uniform >= np.float32(self.probability)).reshape(x.shape)
        return x * keep / (1 - self.probability)


def make(name, config, options, extra={}):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    torch.manual_seed(7)
    if "trained_positions" in extra:
        config.max_position_embeddings = extra["trained_positions"]
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():  # biases and norms start at 0 and 1, where a wrong one could hide
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder / "base")
    (folder / "base/generation_config.json").unlink(missing_ok=True)

    generator = np.random.default_rng(3)
    rows = []
    for _ in range(STEPS * BATCH):
        length = extra.get("length") or int(generator.integers(8, 21))
        ids = generator.integers(0, VOCAB, length).tolist()
        prompt = int(generator.integers(1, length // 2))
        rows.append(dict(input_ids=ids, labels=[-100] * prompt + ids[prompt:]))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    probe = torch.tensor([rows[0]["input_ids"]])
    logits = dict(base_logits_probe=model(probe).logits[0].detach().clone())

    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="../base", **options))
    with torch.no_grad():
        for parameter_name, parameter in wrapped.named_parameters():
            fresh = any(part in parameter_name for part in ("lora_B", "lora_embedding_A", "magnitude"))
            if parameter.requires_grad and fresh and "init_lora_weights" not in options:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    wrapped.peft_config["default"].base_model_name_or_path = "../base"
    step = [0]
    modules = [m for n, m in wrapped.named_modules() if hasattr(m, "lora_dropout") and len(m.lora_dropout)]
    if options.get("lora_dropout"):
        for stream, module in enumerate(modules):  # streams are numbered as a block's projections are
            module.lora_dropout["default"] = Mask(options["lora_dropout"], stream, step)
    save = lambda to: (wrapped.save_pretrained(folder / to), (folder / to / "README.md").unlink(missing_ok=True))
    save("adapter-initial")
    wrapped.eval()
    logits["adapter_logits_probe"] = wrapped(probe).logits[0].detach().clone()

    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0.0)
    if "loraplus" in extra:
        optimizer = create_loraplus_optimizer(wrapped, torch.optim.AdamW, lr=LR, **extra["loraplus"])
    wrapped.train()
    steps, gradients = [], {}
    for index in range(STEPS):
        batch = rows[index * BATCH:(index + 1) * BATCH]
        longest = max(len(row["input_ids"]) for row in batch)
        pad = lambda row, key, value: row[key] + [value] * (longest - len(row[key]))
        ids = torch.tensor([pad(row, "input_ids", 0) for row in batch])
        labels = torch.tensor([pad(row, "labels", -100) for row in batch])
        attention = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch])
        step[0] = index
        out = wrapped(input_ids=ids, attention_mask=attention).logits
        loss = torch.nn.functional.cross_entropy(out[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1), ignore_index=-100)
        optimizer.zero_grad(); loss.backward()
        norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in trained.values()))
        if index == 0:
            gradients = {name_in_file(n): p.grad.clone() for n, p in trained.items()}
        steps.append(dict(step=index + 1, loss=loss.item(), grad_norm=norm.item(), target_tokens=int((labels[:, 1:] != -100).sum())))
        optimizer.step()
    wrapped.eval()
    save("adapter-trained")
    logits["trained_logits_probe"] = wrapped(probe).logits[0].detach().clone()
    prompt = [5, 9, 13, 17]
    tokens = list(prompt)
    for _ in range(12):
        tokens.append(int(wrapped(torch.tensor([tokens])).logits[0, -1].argmax()))
    shared = lambda tensors: {k: v.detach().clone().contiguous() for k, v in tensors.items()}
    save_file(shared(logits), folder / "expected-logits.safetensors")
    save_file(shared(gradients), folder / "expected-first-gradients.safetensors")
    if "shared_matrix" not in extra:
        merged = wrapped.merge_and_unload()
        save_file(shared({k: v for k, v in merged.state_dict().items()}), folder / "expected-merged.safetensors")
    expected = dict(made_by=f"transformers {transformers.__version__} + PEFT {peft.__version__} + torch {torch.__version__}, float32, CPU",
                    batch_size=BATCH, gradient_accumulation=1, greedy_generate=dict(prompt=prompt, tokens=tokens), steps=steps,
                    optimizer=dict(name="AdamW", lr=LR, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0, max_grad_norm=None, **extra.get("loraplus", {})))
    (folder / "expected.json").write_text(json.dumps(expected, indent=1))


for name in sys.argv[1:] or CASES:
    print(name, flush=True)
    make(name, *CASES[name])
