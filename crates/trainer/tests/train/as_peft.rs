//! Adapters of every kind, against the runs of PEFT.

use crate::{losses, own_case, tensors, train};
use std::fs;
use std::path::Path;

/// Cases of this repository, with the flags that make their adapters anew.
const PEFT_CASES: [(&str, &[&str]); 19] = [
    (
        "bias-lora-only",
        &["--target-modules=q_proj,o_proj,up_proj", "--bias=lora_only"],
    ),
    (
        "gpt2-bias-all",
        &["--target-modules=c_attn,mlp.c_proj", "--bias=all"],
    ),
    (
        "bias-dora-dropout",
        &["--bias=all", "--use-dora", "--lora-dropout=0.25"],
    ),
    (
        "lora-bias",
        &[
            "--target-modules=q_proj,v_proj,up_proj",
            "--bias=lora_only",
            "--lora-bias",
        ],
    ),
    (
        "modules-to-save",
        &[
            "--target-modules=q_proj,v_proj",
            "--modules-to-save=norm,embed_tokens,lm_head,0.mlp",
        ],
    ),
    (
        "modules-to-save-tied",
        &[
            "--target-modules=q_proj,v_proj",
            "--modules-to-save=lm_head,k_norm",
        ],
    ),
    (
        "gpt2-modules-to-save",
        &["--target-modules=c_attn", "--modules-to-save=wte,wpe,ln_f"],
    ),
    (
        "lora-embedding",
        &[
            "--target-modules=q_proj,embed_tokens,lm_head",
            "--use-rslora",
        ],
    ),
    (
        "lora-embedding-tied",
        &["--target-modules=v_proj,embed_tokens"],
    ),
    ("lora-head-tied", &["--target-modules=v_proj,lm_head"]),
    ("gpt2-lora-embedding", &["--target-modules=c_attn,wte,wpe"]),
    (
        "trainable-tokens",
        &[
            "--target-modules=q_proj,v_proj",
            "--trainable-token-indices=embed_tokens=3,7,11;lm_head=5,7",
        ],
    ),
    (
        "trainable-tokens-tied",
        &[
            "--target-modules=q_proj,v_proj",
            "--trainable-token-indices=2,3,5,8,13",
        ],
    ),
    ("pissa", &["--init-lora-weights=pissa"]),
    (
        "gpt2-pissa",
        &[
            "--init-lora-weights=pissa",
            "--target-modules=c_attn,c_proj,c_fc",
        ],
    ),
    (
        "loraplus",
        &[
            "--target-modules=q_proj,down_proj,embed_tokens",
            "--bias=lora_only",
            "--modules-to-save=model.norm",
        ],
    ),
    (
        "gpt2-loraplus",
        &[
            "--target-modules=c_attn,c_proj,c_fc",
            "--use-dora",
            "--modules-to-save=ln_f",
        ],
    ),
    ("olora", &["--init-lora-weights=olora"]),
    ("loftq", &["--init-lora-weights=loftq", "--loftq-iter=2"]),
];

/// Flags of LoRA+, and what PEFT's function takes.
const LORAPLUS: [(&str, &str); 3] = [
    ("--loraplus-lr-ratio", "loraplus_lr_ratio"),
    ("--loraplus-lr-embedding", "loraplus_lr_embedding"),
    ("--weight-decay", "loraplus_weight_decay"),
];

/// From PEFT's first adapter: its loss curve, and its trained adapter by its names; in two parts, so that what is
/// saved between them must be whole. Then a new adapter of the same kind, which has the same tensors.
#[test]
fn adapters_are_trained_as_peft_trains_them() {
    for (name, flags) in PEFT_CASES {
        let case = own_case(name);
        let text = fs::read_to_string(case.join("expected.json")).unwrap();
        let expected: serde_json::Value = serde_json::from_str(&text).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let run = |output: &Path| {
            let mut command = train(&case.join("base"), &case.join("train.jsonl"), output);
            command.args([
                "--learning-rate=3e-3",
                "--lr-scheduler=constant",
                "--no-shuffle",
            ]);
            command.args(["--max-grad-norm=0", "--batch-size=4"]);
            let optimizer = &expected["optimizer"];
            for (flag, key) in LORAPLUS {
                if let Some(value) = optimizer.get(key) {
                    command.arg(format!("{flag}={value}"));
                }
            }
            command
        };
        let output = folder.path().join("continued");
        let continued = |steps: &str| {
            let mut command = run(&output);
            command.arg("--adapter").arg(case.join("adapter-initial"));
            command.args(["--steps", steps]);
            command
        };
        continued("2").assert().success();
        continued("5").arg("--resume").assert().success();
        for (step, loss, norm) in losses(&output) {
            let want = &expected["steps"][step as usize - 1];
            let error = |got: f64, key: &str| (got / want[key].as_f64().unwrap() - 1.0).abs();
            let error = error(loss, "loss").max(error(norm, "grad_norm"));
            assert!(
                error < 1e-4,
                "{name}: step {step}: relative error {error:e}"
            );
        }
        // Of a checkpoint: an adapter for use says what pissa and olora have changed since their beginning.
        let file = "checkpoint/adapter_model.safetensors";
        let got = tensors(&output.join(file));
        let want = tensors(&case.join("adapter-trained/adapter_model.safetensors"));
        assert!(got.keys().eq(want.keys()), "{name}: {:?}", got.keys());
        for (tensor, want) in &want {
            let square = |x: f32| f64::from(x) * f64::from(x);
            let mut difference: Vec<f64> = got[tensor]
                .iter()
                .zip(want)
                .map(|(g, w)| square(g - w))
                .collect();
            if tensor.ends_with("c_attn.base_layer.bias") {
                // Without rotary positions a bias of all keys changes no softmax: its gradient is rounding alone, of
                // which Adam makes whole steps. Queries and values are compared.
                let third = want.len() / 3;
                difference.drain(third..2 * third);
            }
            let error =
                difference.iter().sum::<f64>() / want.iter().map(|w| square(*w)).sum::<f64>();
            assert!(error.sqrt() < 2e-3, "{name}: {tensor}: {:e}", error.sqrt());
        }

        let fresh = folder.path().join("fresh");
        let mut command = run(&fresh);
        command
            .args(["--rank=4", "--lora-alpha=8", "--steps=1"])
            .args(flags);
        command.assert().success();
        let fresh = tensors(&fresh.join(file));
        assert!(fresh.keys().eq(want.keys()), "{name}: {:?}", fresh.keys());
    }
}
