"""Makes the adapters beside this file as mlx-lm and llama.cpp's converter do, so that reading and writing them is held against
something else than our own.

Run: python3 make_cases.py, with the packages numpy, safetensors, gguf, mlx[cpu] and mlx-lm (0.32.2).
`mlx-lora` and `mlx-dora` are adapters of `../parity/layers-pattern/base`, made by mlx-lm's own functions with random values,
and the logits that mlx-lm computes with them for the first row of its `train.jsonl`. `llama.gguf` is the trained adapter of
that case, by the rules of llama.cpp's `convert_lora_to_gguf.py`, written by its own package; PEFT's logits are in the case.
"""
import json, pathlib
import gguf
import mlx.core as mx, numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model
from safetensors.numpy import load_file, save_file

HERE = pathlib.Path(__file__).parent
CASE = HERE.parent / "parity" / "layers-pattern"
HEADS, KV_HEADS = 2, 1
mx.set_default_device(mx.cpu)


def mlx_case(name, kind, layers, keys):
    model, _ = load_model(CASE / "base")
    model.freeze()
    parameters = {"rank": 3, "scale": 2.5, "dropout": 0.25, "keys": keys}
    linear_to_lora_layers(model, layers, parameters, use_dora=kind == "dora")
    mx.random.seed(len(name))
    trained = {path: value + 0.1 * mx.random.normal(value.shape) for path, value in tree_flatten(model.trainable_parameters())}
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), trained)
    config = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=4))
    model = load_adapters(load_model(CASE / "base")[0], str(folder))
    model.eval()
    row = json.loads((CASE / "train.jsonl").read_text().splitlines()[0])
    logits = np.array(model(mx.array([row["input_ids"]]))[0])
    save_file({"logits": logits}, folder / "expected-logits.safetensors")


def permute(rows, heads):
    """llama.cpp's: the rows of each head from rotary halves to neighbouring pairs."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def gguf_case():
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    config = json.loads((CASE / "adapter-trained" / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(HERE / "llama.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for name, values in sorted(load_file(CASE / "adapter-trained" / "adapter_model.safetensors").items()):
        module, part = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        if part == "B" and module.endswith(("q_proj", "k_proj")):
            values = permute(values, HEADS if module.endswith("q_proj") else KV_HEADS)
        writer.add_tensor(f"{names.get_name(module)}.weight.lora_{part.lower()}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


mlx_case("mlx-lora", "lora", 1, ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"])
mlx_case("mlx-dora", "dora", 2, ["self_attn.k_proj", "mlp.gate_proj"])
gguf_case()
