//! What a CUDA device cannot do is an error that names the tensor, before anything is launched.

use crate::device;
use fuselora_tensor::{
    DType, Device, Error, Tensor, Weight,
    ops::{
        attention::{self, AttentionConfig, Rows},
        cross_entropy, elementwise, gather,
        gelu::{self, GeluKind},
        kv_cache, layer_norm,
        lora_linear::{self, Backward, Gradients, Lora, Projection},
        optimizer::{self, AdamWHyper, AdamWParam, AdamWRates},
        rms_norm,
        rope::{self, RopeTable},
        swiglu,
    },
};

const ATTENTION: AttentionConfig = AttentionConfig {
    heads: 2,
    kv_heads: 1,
    head_dim: 2,
    scale: 1.0,
    window: None,
};

fn ones(on: &Device, shape: &[usize]) -> Tensor {
    Tensor::full_f32(on, shape, 1.0).unwrap()
}

fn indices(on: &Device, values: &[u32]) -> Tensor {
    Tensor::from_u32(on, [values.len()], values).unwrap()
}

#[track_caller]
fn refuses<T>(result: Result<T, Error>, expected: &str) {
    let message = result.err().expect("the call is refused").to_string();
    assert_eq!(message, expected);
}

/// Every operation of several tensors, with one of them elsewhere.
#[test]
fn tensors_of_two_devices_do_not_meet() {
    let (cuda, cpu) = (&device(), &Device::cpu());
    let elsewhere = |name: &str| format!("{name}: expected on cuda:0, found on the cpu");
    let x = || ones(cuda, &[3, 4]);
    let other = || ones(cpu, &[3, 4]);
    let weight = &Weight::Dense(ones(cuda, &[5, 4]));
    let (a, b) = (&ones(cuda, &[2, 4]), &ones(cuda, &[5, 2]));

    refuses(elementwise::add_assign(&mut x(), &other()), &elsewhere("x"));
    refuses(
        elementwise::subtract_assign(&mut x(), &other()),
        &elsewhere("x"),
    );
    refuses(swiglu::forward(&x(), &other()), &elsewhere("up"));
    refuses(swiglu::backward(&x(), other(), x()), &elsewhere("gate"));
    refuses(
        gelu::backward(x(), &other(), GeluKind::Tanh),
        &elsewhere("x"),
    );

    let scale = &ones(cuda, &[4]);
    let (scale_elsewhere, rstd) = (&ones(cpu, &[4]), &ones(cuda, &[3]));
    refuses(
        rms_norm::forward(&x(), scale_elsewhere, 1e-5),
        &elsewhere("weight"),
    );
    refuses(
        rms_norm::forward_add(&x(), &other(), scale, 1e-5),
        &elsewhere("delta"),
    );
    refuses(
        rms_norm::recompute(&x(), &ones(cpu, &[3]), scale),
        &elsewhere("rstd"),
    );
    refuses(
        rms_norm::backward(&other(), &x(), rstd, scale, &mut x(), None),
        &elsewhere("dy"),
    );
    refuses(
        layer_norm::forward(&x(), scale, scale_elsewhere, 1e-5),
        &elsewhere("bias"),
    );
    let (_, statistics) = layer_norm::forward(&x(), scale, scale, 1e-5).unwrap();
    refuses(
        layer_norm::backward(&x(), &x(), &statistics, scale, &mut other(), None),
        &elsewhere("dx"),
    );

    let update = Lora {
        a,
        b,
        scaling: 1.0,
        dropout: None,
    };
    let plain = Projection {
        weight,
        bias: None,
        lora: Some(update),
    };
    let weight_elsewhere = Weight::Dense(ones(cpu, &[5, 4]));
    let (b_elsewhere, bias) = (ones(cpu, &[5, 2]), ones(cpu, &[5]));
    for (name, projection) in [
        (
            "weight",
            Projection {
                weight: &weight_elsewhere,
                ..plain
            },
        ),
        (
            "bias",
            Projection {
                bias: Some(&bias),
                ..plain
            },
        ),
        (
            "lora_b",
            Projection {
                lora: Some(Lora {
                    b: &b_elsewhere,
                    ..update
                }),
                ..plain
            },
        ),
    ] {
        refuses(
            lora_linear::forward(&x(), &[projection]),
            &elsewhere(&format!("projection 0: {name}")),
        );
    }
    let (dy, h) = (&ones(cuda, &[3, 5]), &ones(cuda, &[3, 2]));
    let (mut da, mut db) = (ones(cuda, &[2, 4]), ones(cpu, &[5, 2]));
    let item = Backward {
        projection: plain,
        dy,
        h: Some(h),
        gradients: Some(Gradients {
            a: &mut da,
            b: &mut db,
        }),
    };
    refuses(
        lora_linear::backward(&x(), vec![item], true),
        &elsewhere("projection 0: gradient of lora_b"),
    );

    let rows = &Rows::new(cuda, &[3]).unwrap();
    let rows_elsewhere = &Rows::new(cpu, &[3]).unwrap();
    let k = &ones(cuda, &[3, 2]);
    let k_elsewhere = &ones(cpu, &[3, 2]);
    for (name, k, v, kv_rows) in [
        ("k", k_elsewhere, k, rows),
        ("v", k, k_elsewhere, rows),
        ("kv_rows", k, k, rows_elsewhere),
    ] {
        refuses(
            attention::forward(&x(), k, v, rows, kv_rows, &ATTENTION),
            &elsewhere(name),
        );
    }

    let positions = indices(cpu, &[0, 1, 2]);
    let table = RopeTable::new(cuda, &[1.0], 8, 1.0).unwrap();
    refuses(
        rope::apply(&mut x(), 2, &positions, &table),
        &elsewhere("positions"),
    );
    refuses(
        gather::forward(weight, &positions),
        "table: expected on the cpu, found on cuda:0",
    );
    refuses(
        gather::scatter_add_rows(&other(), &indices(cuda, &[0, 1, 2]), &mut x()),
        &elsewhere("dy"),
    );
    refuses(kv_cache::append(&mut x(), 0, &other()), &elsewhere("x"));
    let mut loss = ones(cuda, &[1]);
    refuses(
        cross_entropy::forward(&x(), &positions, &mut loss),
        &elsewhere("targets"),
    );
    let targets = &indices(cuda, &[0, 1, 2]);
    refuses(
        cross_entropy::forward_backward(&mut x(), targets, &ones(cpu, &[1]), &mut loss),
        &elsewhere("grad_scale"),
    );

    let hyper = AdamWHyper {
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        max_grad_norm: 1.0,
    };
    let rates = AdamWRates::new(cuda, 1).unwrap();
    let (mut p, mut m, mut v) = (x(), x(), x());
    let param = AdamWParam {
        param: &mut p,
        grad: &other(),
        m: &mut m,
        v: &mut v,
        rate: 0,
    };
    refuses(
        optimizer::adamw(&mut [param], hyper, &rates, &ones(cuda, &[1])),
        &elsewhere("grad"),
    );
    let mut norm = ones(cuda, &[1]);
    refuses(
        optimizer::global_norm(&[&x(), &other()], &mut norm),
        &elsewhere("grad"),
    );
}

/// Rows of no elements are as many as an extent says, and take no memory.
#[test]
fn more_than_kernels_count() {
    let cuda = &device();
    let extent = (1 << 31) + 1;
    let weight = Weight::Dense(ones(cuda, &[0, 0]));
    let plain = Projection {
        weight: &weight,
        bias: None,
        lora: None,
    };
    refuses(
        lora_linear::forward(&ones(cuda, &[extent, 0]), &[plain]),
        "x: an extent of 2147483649 is more than kernels count, 2147483648",
    );
    let wide = Weight::Dense(ones(cuda, &[0, extent]));
    refuses(
        gather::forward(&wide, &indices(cuda, &[])),
        "table: an extent of 2147483649 is more than kernels count, 2147483648",
    );
    let mut loss = ones(cuda, &[1]);
    refuses(
        cross_entropy::forward(&ones(cuda, &[0, extent]), &indices(cuda, &[]), &mut loss),
        "logits: an extent of 2147483649 is more than kernels count, 2147483648",
    );
    refuses(
        Tensor::empty(cuda, [1 << 40, 1 << 40], DType::F32),
        "a tensor of shape [1099511627776, 1099511627776] is too large to address",
    );
}
