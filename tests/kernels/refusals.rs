//! Bad calls are errors that name the tensor and what was expected, before anything is launched: the addresses
//! here lead nowhere.

use crate::device::Device;
use fuselora_kernels::abi::AdamWStep;
use fuselora_kernels::attention::{self, Attention, Rows};
use fuselora_kernels::loss::cross_entropy_forward;
use fuselora_kernels::optimizer::{AdamWParam, adamw};
use fuselora_kernels::{Element, LaunchError, Operand, OperandMut, activation, elementwise};

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

/// A view that begins in the middle of another tensor.
#[test]
fn misaligned_tensors() {
    let device = Device::open();
    let kernels = &device.kernels;
    let shifted = operand(NOWHERE + 4, 8, Element::F32);
    refuses(
        activation::swiglu_forward(kernels, shifted, f32s(8), f32s_mut(8)),
        "gate must start at a multiple of 16 bytes",
    );
    let targets = operand(NOWHERE, 2, Element::U32);
    refuses(
        cross_entropy_forward(kernels, 4, shifted, targets, f32s_mut(2), f32s_mut(1)),
        "logits must start at a multiple of 16 bytes",
    );
    let halves = operand(NOWHERE + 2, 8, Element::F16);
    refuses(
        elementwise::cast(kernels, halves, f32s_mut(8)),
        "x must start at a multiple of 16 bytes",
    );
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
