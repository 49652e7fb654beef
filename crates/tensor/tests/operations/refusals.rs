//! A bad call is an error that names the tensor.

use crate::sample::{indices, tensor};
use fuselora_tensor::{
    DType, Device, Error, Tensor, Weight,
    ops::{
        attention::{self, AttentionConfig, Rows},
        cross_entropy, gather, kv_cache, layer_norm,
        lora_linear::{self, Backward, Dropout, Gradients, Lora, Projection},
        optimizer::{AdamWHyper, AdamWParam, AdamWRate, AdamWRates, adamw},
        rms_norm,
        rope::{self, RopeTable},
        swiglu,
    },
};

fn ones(rows: usize, columns: usize) -> Tensor {
    Tensor::full_f32(&Device::cpu(), [rows, columns], 1.0).unwrap()
}

#[track_caller]
fn refuses<T>(result: Result<T, Error>, words: &[&str]) {
    let message = result
        .err()
        .expect("the call should be refused")
        .to_string();
    for word in words {
        assert!(
            message.contains(word),
            "{message:?} should mention {word:?}"
        );
    }
}

#[test]
fn tensors() {
    let cpu = Device::cpu();
    refuses(
        Tensor::from_f32(&cpu, [2, 3], &[0.0; 5]),
        &["[2, 3]", "24", "20"],
    );
    refuses(
        Tensor::empty(&cpu, [usize::MAX, 4], DType::F32),
        &["too large"],
    );
    refuses(
        Tensor::empty(&cpu, [1 << 60], DType::F32),
        &["out of memory"],
    );
    refuses(ones(2, 3).reshape([7]), &["[2, 3]", "[7]"]);
    refuses(ones(2, 3).as_u32().map(drop), &["u32", "f32"]);
    refuses(ones(2, 3).cast(DType::U32), &["u32"]);
    let mut shared = Tensor::from_shared(
        &cpu,
        [4],
        DType::U8,
        bytes::Bytes::from_static(&[1, 2, 3, 4]),
    )
    .unwrap();
    refuses(shared.fill_zero(), &["read-only"]);
    refuses(ones(2, 3).copy_from(&ones(3, 2)), &["source", "[2, 3]"]);
    refuses(
        Weight::Dense(ones(2, 3)).rows_f32(1..3, &mut [0.0; 6]),
        &["1..3"],
    );
}

#[test]
fn lora_linears() {
    let (x, w) = (ones(5, 4), Weight::Dense(ones(3, 4)));
    let (a, b) = (ones(2, 4), ones(3, 2));
    let lora = Lora {
        a: &a,
        b: &b,
        scaling: 1.0,
        dropout: None,
    };
    let plain = Projection {
        weight: &w,
        bias: None,
        lora: Some(lora),
    };
    let forward = |projection| lora_linear::forward(&x, &[projection]);
    assert!(forward(plain).is_ok());
    let (a_bad, b_bad, bias_bad, w_bad) = (
        ones(2, 5),
        ones(3, 3),
        ones(1, 3),
        Weight::Dense(ones(3, 6)),
    );
    refuses(
        forward(Projection {
            lora: Some(Lora { a: &a_bad, ..lora }),
            ..plain
        }),
        &["projection 0: lora_a", "[2, 4]"],
    );
    refuses(
        forward(Projection {
            lora: Some(Lora { b: &b_bad, ..lora }),
            ..plain
        }),
        &["lora_b", "[3, 2]"],
    );
    refuses(
        forward(Projection {
            bias: Some(&bias_bad),
            ..plain
        }),
        &["bias", "[3]"],
    );
    refuses(
        forward(Projection {
            weight: &w_bad,
            ..plain
        }),
        &["x", "[5, 6]"],
    );
    let step = indices(&[0]);
    let dropout = Some(Dropout {
        probability: 1.0,
        seed: 0,
        stream: 0,
        step: &step,
    });
    refuses(
        forward(Projection {
            lora: Some(Lora { dropout, ..lora }),
            ..plain
        }),
        &["dropout", "1"],
    );
    let half = ones(5, 4).cast(DType::BF16).unwrap();
    refuses(lora_linear::forward(&half, &[plain]), &["x", "f32", "bf16"]);
    refuses(lora_linear::merge(&w, &a_bad, &b, 1.0), &["lora_a"]);

    let (mut da, mut db, dy) = (ones(2, 4), ones(3, 2), ones(5, 3));
    let gradients = Some(Gradients {
        a: &mut da,
        b: &mut db,
    });
    refuses(
        lora_linear::backward(
            &x,
            vec![Backward {
                projection: plain,
                dy: &dy,
                h: None,
                gradients,
            }],
            true,
        ),
        &["h of the forward pass"],
    );
    let dy = ones(5, 4);
    refuses(
        lora_linear::backward(
            &x,
            vec![Backward {
                projection: plain,
                dy: &dy,
                h: None,
                gradients: None,
            }],
            true,
        ),
        &["dy", "[5, 3]"],
    );
}

#[test]
fn attentions() {
    let cpu = Device::cpu();
    let config = AttentionConfig {
        heads: 4,
        kv_heads: 2,
        head_dim: 3,
        scale: 1.0,
        window: None,
    };
    let rows = |lengths: &[usize]| Rows::new(&cpu, lengths).unwrap();
    let run =
        |config: &AttentionConfig, q: Tensor, k: Tensor, q_rows: &[usize], kv_rows: &[usize]| {
            attention::forward(&q, &k, &k, &rows(q_rows), &rows(kv_rows), config)
        };
    assert!(run(&config, ones(5, 12), ones(5, 6), &[2, 3], &[2, 3]).is_ok());
    refuses(
        run(&config, ones(5, 11), ones(5, 6), &[5], &[5]),
        &["q", "[5, 12]"],
    );
    refuses(
        run(&config, ones(5, 12), ones(5, 12), &[5], &[5]),
        &["k", "[5, 6]"],
    );
    refuses(
        run(&config, ones(5, 12), ones(4, 6), &[5], &[5]),
        &["k", "[5, 6]"],
    );
    refuses(
        run(&config, ones(5, 12), ones(5, 6), &[2, 3], &[3, 2]),
        &["sequence 1", "fewer keys"],
    );
    refuses(
        run(&config, ones(5, 12), ones(5, 6), &[5], &[2, 3]),
        &["sequences"],
    );
    refuses(
        run(
            &AttentionConfig { heads: 3, ..config },
            ones(5, 9),
            ones(5, 6),
            &[5],
            &[5],
        ),
        &["3 heads"],
    );
    refuses(
        run(
            &AttentionConfig {
                window: Some(0),
                ..config
            },
            ones(5, 12),
            ones(5, 6),
            &[5],
            &[5],
        ),
        &["window"],
    );
    refuses(Rows::new(&cpu, &[usize::MAX]), &["2^32"]);
}

#[test]
fn the_others() {
    let table = Weight::Dense(ones(3, 2));
    refuses(
        gather::forward(&table, &indices(&[0, 2, 3])),
        &["ids", "index 3", "position 2"],
    );
    refuses(
        gather::rows(&ones(3, 2), &indices(&[9])),
        &["index 9", "position 0"],
    );
    refuses(
        gather::scatter_add_rows(&ones(1, 2), &indices(&[3]), &mut ones(3, 2)),
        &["index 3"],
    );
    refuses(
        cross_entropy::forward(&ones(2, 4), &indices(&[1, 4]), &mut tensor([1], &[0.0])),
        &["targets", "index 4"],
    );
    refuses(
        cross_entropy::forward(&ones(2, 4), &indices(&[1]), &mut tensor([1], &[0.0])),
        &["targets", "[2]"],
    );
    refuses(
        rms_norm::forward(&ones(2, 4), &tensor([3], &[1.0; 3]), 1e-5),
        &["weight", "[4]"],
    );
    refuses(
        rms_norm::forward(&ones(2, 0), &tensor([0], &[]), 1e-5),
        &["without elements"],
    );
    refuses(swiglu::forward(&ones(2, 4), &ones(4, 2)), &["up", "[2, 4]"]);
    refuses(
        kv_cache::append(&mut ones(4, 2), 3, &ones(2, 2)),
        &["cache", "row 3"],
    );
    let table = RopeTable::new(&Device::cpu(), &[1.0, 0.1], 8, 1.0).unwrap();
    refuses(
        rope::apply(&mut ones(1, 8), 2, &indices(&[8]), &table),
        &["positions", "index 8"],
    );
    refuses(
        rope::apply(&mut ones(1, 6), 2, &indices(&[0]), &table),
        &["x", "2 heads"],
    );
}

#[test]
fn optimizer_steps() {
    let hyper = AdamWHyper {
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        max_grad_norm: 1.0,
    };
    let rate = AdamWRate {
        lr: 1e-3,
        weight_decay: 0.0,
    };
    let mut rates = AdamWRates::new(&Device::cpu(), 2).unwrap();
    refuses(rates.set(0, &hyper, &[rate; 2]), &["counted from 1"]);
    refuses(rates.set(1, &hyper, &[rate; 3]), &["[2, 3]", "24", "36"]);
    let (mut p, grad) = (ones(1, 2), ones(1, 2));
    let (mut m, mut v) = (ones(1, 2), ones(1, 2));
    let param = AdamWParam {
        param: &mut p,
        grad: &grad,
        m: &mut m,
        v: &mut v,
        rate: 2,
    };
    refuses(
        adamw(&mut [param], hyper, &rates, &tensor([1], &[1.0])),
        &["the rate 2", "2 rates"],
    );
}

/// What makes a result of every token has nothing to do without one, and a call that means to is a mistake.
#[test]
fn no_tokens() {
    let (none, weight) = (ones(0, 4), ones(3, 4));
    let frozen = Weight::Dense(weight);
    let plain = Projection {
        weight: &frozen,
        bias: None,
        lora: None,
    };
    let message = "x: expected shape [tokens, in_features] of at least one token, found [0, 4]";
    refuses(lora_linear::forward(&none, &[plain]), &[message]);
    let item = Backward {
        projection: plain,
        dy: &ones(0, 3),
        h: None,
        gradients: None,
    };
    refuses(lora_linear::backward(&none, vec![item], true), &[message]);
    refuses(
        rms_norm::forward(&none, &tensor([4], &[1.0; 4]), 1e-5),
        &["x", "[tokens, width] of at least one token"],
    );
    let scale = tensor([4], &[1.0; 4]);
    refuses(
        layer_norm::forward(&none, &scale, &scale, 1e-5),
        &["x", "[tokens, width] of at least one token"],
    );
    let table = RopeTable::new(&Device::cpu(), &[1.0, 0.1], 8, 1.0).unwrap();
    refuses(
        rope::apply(&mut ones(0, 8), 2, &indices(&[]), &table),
        &["x", "of at least one token"],
    );
    let rows = Rows::new(&Device::cpu(), &[]).unwrap();
    let config = AttentionConfig {
        heads: 1,
        kv_heads: 1,
        head_dim: 4,
        scale: 1.0,
        window: None,
    };
    refuses(
        attention::forward(&none, &none, &none, &rows, &rows, &config),
        &["q", "of at least one token"],
    );
}
