//! Bad calls are errors that name the tensor and what was expected, before anything is launched: the addresses
//! here lead nowhere.

use crate::device::Device;
use fuselora_kernels::abi::{AdamWStep, EmbeddingShape, MatmulShape, NormShape, RopeShape};
use fuselora_kernels::activation::{self, Gelu};
use fuselora_kernels::attention::{self, Attention, Rows};
use fuselora_kernels::lora_linear::{self, Projection};
use fuselora_kernels::loss::cross_entropy_forward;
use fuselora_kernels::matmul::{Layout, matmul};
use fuselora_kernels::norm::{layer_norm, rms_norm};
use fuselora_kernels::optimizer::{AdamWParam, adamw};
use fuselora_kernels::rope::rope;
use fuselora_kernels::{Element, LaunchError, Operand, OperandMut, elementwise, embedding, nf4};

const NOWHERE: u64 = 0x1000;

fn operand(address: u64, len: usize, element: Element) -> Operand<'static> {
    // SAFETY: every call here is refused, so that nothing is read.
    unsafe { Operand::from_raw(address, len, element) }
}

fn operand_mut(address: u64, len: usize, element: Element) -> OperandMut<'static> {
    // SAFETY: as above, nothing is written.
    unsafe { OperandMut::from_raw(address, len, element) }
}

fn f32s(len: usize) -> Operand<'static> {
    operand(NOWHERE, len, Element::F32)
}

fn f32s_mut(len: usize) -> OperandMut<'static> {
    operand_mut(NOWHERE, len, Element::F32)
}

#[track_caller]
fn refuses(result: Result<(), LaunchError>, expected: &str) {
    assert_eq!(result.unwrap_err().to_string(), expected);
}

/// A view that begins in the middle of another tensor, where a kernel's accesses are wider than its elements.
#[test]
fn misaligned_tensors() {
    let device = Device::open();
    let kernels = &device.kernels;
    let shifted = || operand(NOWHERE + 4, 8, Element::F32);
    let shifted_mut = || operand_mut(NOWHERE + 4, 8, Element::F32);
    let (eight, eight_mut) = (|| f32s(8), || f32s_mut(8));
    let ids = operand(NOWHERE, 2, Element::U32);
    let halves = operand(NOWHERE + 2, 8, Element::F16);
    let codes_mut = operand_mut(NOWHERE + 1, 16, Element::U8);
    let norm = NormShape {
        tokens: 2,
        width: 4,
        eps: 1e-5,
    };
    let embedding = EmbeddingShape { rows: 2, width: 4 };
    let rope_shape = RopeShape {
        heads: 1,
        head_dim: 4,
        half: 2,
        table_rows: 4,
        direction: 1.0,
    };
    let param = AdamWParam {
        param: eight_mut(),
        grad: shifted(),
        m: eight_mut(),
        v: eight_mut(),
        rate: 0,
    };
    let weight = nf4::Weight {
        elements: 32,
        block_size: 32,
        packed: operand(NOWHERE + 4, 16, Element::U8),
        absmax: nf4::Absmax::Plain(f32s(1)),
    };
    for (result, tensor, bytes) in [
        (
            activation::swiglu_forward(kernels, shifted(), eight(), eight_mut()),
            "gate",
            16,
        ),
        (
            activation::gelu_forward(kernels, Gelu::Tanh, eight(), shifted_mut()),
            "y",
            16,
        ),
        (elementwise::cast(kernels, halves, eight_mut()), "x", 16),
        (
            elementwise::add_assign(kernels, eight(), shifted_mut()),
            "y",
            16,
        ),
        (elementwise::scale(kernels, shifted_mut(), 2.0), "x", 16),
        (
            rms_norm::forward(kernels, norm, shifted(), f32s(4), eight_mut(), f32s_mut(2)),
            "x",
            16,
        ),
        (
            layer_norm::forward(
                kernels,
                norm,
                eight(),
                operand(NOWHERE + 4, 4, Element::F32),
                f32s(4),
                eight_mut(),
                f32s_mut(2),
                f32s_mut(2),
            ),
            "weight",
            16,
        ),
        (
            rope(kernels, rope_shape, eight_mut(), ids, eight(), shifted()),
            "sin",
            16,
        ),
        (
            embedding::gather(kernels, embedding, eight(), ids, shifted_mut()),
            "y",
            16,
        ),
        (
            embedding::scatter_add(kernels, embedding, shifted(), ids, eight_mut()),
            "dy",
            16,
        ),
        (
            cross_entropy_forward(kernels, 4, shifted(), ids, f32s_mut(2), f32s_mut(1)),
            "logits",
            16,
        ),
        (
            adamw(kernels, &[param], AdamWStep::default(), f32s(3), f32s(1)),
            "grad",
            16,
        ),
        (
            nf4::dequantize(kernels, &weight, 0, f32s_mut(32)),
            "packed",
            16,
        ),
        (
            nf4::quantize(kernels, f32s(32), 32, codes_mut, f32s_mut(1)),
            "packed",
            4,
        ),
    ] {
        refuses(
            result,
            &format!("{tensor} must start at a multiple of {bytes} bytes"),
        );
    }
}

/// No view may begin within an element, whatever a kernel's accesses are.
#[test]
fn tensors_that_begin_within_an_element() {
    let device = Device::open();
    let kernels = &device.kernels;
    let torn = |len| operand(NOWHERE + 1, len, Element::F32);
    let shape = MatmulShape { m: 2, n: 2, k: 2 };
    let projection = |weight| Projection {
        weight: lora_linear::Weight::Dense(weight),
        bias: None,
        out_features: 2,
        lora: None,
    };
    let forward = |x, weight| {
        let output = lora_linear::Output {
            y: f32s_mut(4),
            h: None,
        };
        lora_linear::forward(
            kernels,
            2,
            2,
            x,
            &[projection(weight)],
            &[output],
            f32s_mut(0),
        )
    };
    for (result, tensor) in [
        (
            matmul(kernels, Layout::Nt, shape, f32s(4), torn(4), f32s_mut(4)),
            "b",
        ),
        (forward(torn(4), f32s(4)), "x"),
        (forward(f32s(4), torn(4)), "weight"),
    ] {
        refuses(
            result,
            &format!("{tensor} must start at a multiple of 4 bytes"),
        );
    }
}

#[test]
fn other_lengths_and_types() {
    let device = Device::open();
    let kernels = &device.kernels;
    refuses(
        activation::swiglu_forward(kernels, f32s(8), f32s(7), f32s_mut(8)),
        "up holds 7 elements where 8 were expected",
    );
    let indices = operand(NOWHERE, 8, Element::U32);
    refuses(
        activation::swiglu_forward(kernels, indices, f32s(8), f32s_mut(8)),
        "gate holds u32 where f32 was expected",
    );
}

/// Rows along which 32 bits would not count.
#[test]
fn rows_that_are_too_long() {
    let device = Device::open();
    let kernels = &device.kernels;
    let width = (1 << 31) + 8;
    let (row, one) = (|| f32s(width as usize), || f32s_mut(1));
    let row_mut = || f32s_mut(width as usize);
    let id = operand(NOWHERE, 1, Element::U32);
    let norm = NormShape {
        tokens: 1,
        width,
        eps: 1e-5,
    };
    let embedding = EmbeddingShape { rows: 1, width };
    let rope_shape = RopeShape {
        heads: width / 4,
        head_dim: 4,
        half: 2,
        table_rows: 1,
        direction: 1.0,
    };
    let shape = MatmulShape {
        m: 1,
        n: 1,
        k: width,
    };
    for (result, parameter) in [
        (
            rms_norm::forward(kernels, norm, row(), row(), row_mut(), one()),
            "width",
        ),
        (
            embedding::gather(kernels, embedding, row(), id, row_mut()),
            "width",
        ),
        (
            cross_entropy_forward(kernels, width, row(), id, one(), one()),
            "vocab",
        ),
        (
            rope(kernels, rope_shape, row_mut(), id, f32s(2), f32s(2)),
            "heads times head_dim",
        ),
        (matmul(kernels, Layout::Nt, shape, row(), row(), one()), "k"),
    ] {
        let expected = format!("{parameter} is 2147483656: a row has at most 2^31 elements");
        refuses(result, &expected);
    }
}

/// More elements than a kernel counts, and more rows than a grid covers.
#[test]
fn tensors_that_are_too_large() {
    let device = Device::open();
    let kernels = &device.kernels;
    let len = 1 << 32;
    let param = AdamWParam {
        param: f32s_mut(len),
        grad: f32s(len),
        m: f32s_mut(len),
        v: f32s_mut(len),
        rate: 0,
    };
    refuses(
        adamw(kernels, &[param], AdamWStep::default(), f32s(3), f32s(1)),
        "param is 4294967296: a tensor of the optimizer has at most 2^32 - 1 elements",
    );
    let n = 1 << 31;
    let targets = operand(NOWHERE, n, Element::U32);
    refuses(
        cross_entropy_forward(kernels, 1, f32s(n), targets, f32s_mut(n), f32s_mut(1)),
        "targets is 2147483648: the grid of a kernel cannot cover as many",
    );
    let rows = Rows {
        cu_seqlens: operand(NOWHERE, 2, Element::U32),
        total: 1 << 31,
        max_len: 1 << 31,
    };
    let call = Attention {
        heads: 1,
        kv_heads: 1,
        head_dim: 1,
        scale: 1.0,
        window: None,
        q_rows: rows,
        kv_rows: rows,
    };
    let [q, k, v] = [f32s(n); 3];
    let (o, lse) = (f32s_mut(n), f32s_mut(n));
    refuses(
        attention::forward(kernels, &call, q, k, v, o, lse, f32s_mut(0)),
        "kv_rows.max_len is 2147483648: times the heads that share a key head, it must be at most 2^30",
    );
}
