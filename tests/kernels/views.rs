//! Views that begin at any element of another tensor: the kernels of the fused linear layer and of attention compute on
//! them what they compute on tensors of their own, where they do not refuse them by name.

use crate::device::{Device, numbers};
use crate::storage::Storage;
use cudarc::driver::{CudaSlice, DeviceRepr, ValidAsZeroBits};
use fuselora_kernels::attention::{self, Attention, Rows};
use fuselora_kernels::lora_linear::{
    Backward, Gradients, Lora, Output, Projection, Weight, backward, backward_workspace, forward,
    forward_workspace,
};
use fuselora_kernels::{Element, LaunchError, Operand, OperandMut, Stored};
use half::{bf16, f16};

/// Elements before the view, where there are any: no kernel may read or write them.
const BEFORE: usize = 1;

/// A tensor that begins in another, or at the start of its own memory.
struct View<T> {
    memory: CudaSlice<T>,
    len: usize,
    first: usize,
}

impl<T: Stored + DeviceRepr + ValidAsZeroBits + Copy + Default> View<T> {
    fn of(device: &Device, values: &[T], is_shifted: bool) -> View<T> {
        let first = if is_shifted { BEFORE } else { 0 };
        let mut all = vec![T::default(); first];
        all.extend_from_slice(values);
        View {
            memory: device.upload(&all),
            len: values.len(),
            first,
        }
    }

    fn address(&self, device: &Device) -> u64 {
        let bytes = self.first as u64 * T::ELEMENT.size_in_bytes();
        device.operand(&self.memory).address() + bytes
    }

    fn operand<'a>(&'a self, device: &'a Device) -> Operand<'a> {
        // SAFETY: within memory that is borrowed.
        unsafe { Operand::from_raw(self.address(device), self.len, T::ELEMENT) }
    }

    fn operand_mut<'a>(&'a mut self, device: &'a Device) -> OperandMut<'a> {
        // SAFETY: as above, and the borrow is the only one.
        unsafe { OperandMut::from_raw(self.address(device), self.len, T::ELEMENT) }
    }

    fn values(&self, device: &Device) -> Vec<T> {
        device.download(&self.memory).split_off(self.first)
    }
}

/// What a call computed, tensor by tensor.
type Results = Vec<(&'static str, Vec<f64>)>;

/// Runs `call` with none of `tensors` shifted, then with each of them.
fn each_shifted<T: Storage>(
    tensors: &[&'static str],
    call: impl Fn(Option<&str>) -> Result<Results, LaunchError>,
) {
    let expected = call(None).expect("tensors of their own are computed on");
    for &shifted in tensors {
        let found = match call(Some(shifted)) {
            Ok(found) => found,
            Err(LaunchError::Misaligned { tensor, .. }) if tensor == shifted => continue,
            Err(error) => panic!("{shifted} is shifted: {error}"),
        };
        for ((name, found), (_, expected)) in found.iter().zip(&expected) {
            let norm = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
            let difference = found.iter().zip(expected).map(|(a, b)| (a - b) * (a - b));
            let error = difference.sum::<f64>().sqrt() / norm;
            // Another kernel may add in another order.
            assert!(
                error <= 2.0 * T::ROUNDING,
                "{shifted} is shifted: {name} is {error:e} off"
            );
        }
    }
}

fn wide<T: Storage>(values: Vec<T>) -> Vec<f64> {
    values.into_iter().map(Storage::value).collect()
}

fn lora_linear<T: Storage>(tokens: usize) {
    let (inputs, outputs, rank) = (64, 72, 8);
    let device = Device::open();
    each_shifted::<T>(
        &[
            "x", "weight", "bias", "lora_a", "lora_b", "y", "h", "dy", "dx", "da", "db",
        ],
        |shifted| {
            let is = |name| shifted == Some(name);
            let stored = |name, count| {
                let values: Vec<T> = numbers(count as u64, count)
                    .into_iter()
                    .map(T::of)
                    .collect();
                View::of(&device, &values, is(name))
            };
            let f32s = |name, count| View::of(&device, &numbers(count as u64 + 1, count), is(name));
            let x = stored("x", tokens * inputs);
            let weight = stored("weight", outputs * inputs);
            let bias = f32s("bias", outputs);
            let (a, b) = (
                f32s("lora_a", rank * inputs),
                f32s("lora_b", outputs * rank),
            );
            let mut y = stored("y", tokens * outputs);
            let mut h = f32s("h", tokens * rank);
            let projection = Projection {
                weight: Weight::Dense(weight.operand(&device)),
                bias: Some(bias.operand(&device)),
                out_features: outputs as u32,
                lora: Some(Lora {
                    a: a.operand(&device),
                    b: b.operand(&device),
                    rank: rank as u32,
                    scaling: 0.5,
                    dropout: None,
                }),
            };
            let extents = [tokens, inputs].map(|extent| extent as u32);
            let needed = forward_workspace(extents[0], extents[1], &[projection]);
            let mut workspace = device.output::<f32>(needed as usize);
            forward(
                &device.kernels,
                extents[0],
                extents[1],
                x.operand(&device),
                &[projection],
                &[Output {
                    y: y.operand_mut(&device),
                    h: Some(h.operand_mut(&device)),
                }],
                device.operand_mut(&mut workspace),
            )?;
            let dy = stored("dy", tokens * outputs);
            let mut dx = stored("dx", tokens * inputs);
            let (mut da, mut db) = (f32s("da", rank * inputs), f32s("db", outputs * rank));
            let item = Backward {
                projection,
                dy: dy.operand(&device),
                h: Some(h.operand(&device)),
                gradients: Some(Gradients {
                    a: da.operand_mut(&device),
                    b: db.operand_mut(&device),
                }),
            };
            let items = [item];
            let needed = backward_workspace(extents[0], extents[1], &items);
            let mut workspace = device.output::<f32>(needed as usize);
            backward(
                &device.kernels,
                extents[0],
                extents[1],
                x.operand(&device),
                &items,
                Some(dx.operand_mut(&device)),
                device.operand_mut(&mut workspace),
            )?;
            Ok(vec![
                ("y", wide(y.values(&device))),
                ("h", wide(h.values(&device))),
                ("dx", wide(dx.values(&device))),
                ("da", wide(da.values(&device))),
                ("db", wide(db.values(&device))),
            ])
        },
    );
}

#[test]
fn of_the_linear_layer() {
    lora_linear::<f32>(24);
    lora_linear::<f16>(24);
    lora_linear::<bf16>(24);
}

#[test]
fn of_the_linear_layer_for_few_tokens() {
    lora_linear::<bf16>(3);
}

fn attention<T: Storage>() {
    let (tokens, heads, head_dim) = (20, 2, 64);
    let device = Device::open();
    let cu_seqlens = device.upload(&[0u32, tokens as u32]);
    each_shifted::<T>(&["q", "k", "v", "o", "lse"], |shifted| {
        let is = |name| shifted == Some(name);
        let stored = |name, count| {
            let values: Vec<T> = numbers(count as u64, count)
                .into_iter()
                .map(T::of)
                .collect();
            View::of(&device, &values, is(name))
        };
        let q = stored("q", tokens * heads * head_dim);
        let (k, v) = (
            stored("k", tokens * head_dim),
            stored("v", tokens * head_dim),
        );
        let mut o = stored("o", tokens * heads * head_dim);
        let mut lse = View::of(&device, &vec![0.0f32; tokens * heads], is("lse"));
        let rows = Rows {
            cu_seqlens: device.operand(&cu_seqlens),
            total: tokens as u32,
            max_len: tokens as u32,
        };
        let call = Attention {
            heads: heads as u32,
            kv_heads: 1,
            head_dim: head_dim as u32,
            scale: 0.125,
            window: None,
            q_rows: rows,
            kv_rows: rows,
        };
        // SAFETY: nothing is read or written.
        let no_partial = unsafe { OperandMut::from_raw(0, 0, Element::F32) };
        attention::forward(
            &device.kernels,
            &call,
            q.operand(&device),
            k.operand(&device),
            v.operand(&device),
            o.operand_mut(&device),
            lse.operand_mut(&device),
            no_partial,
        )?;
        Ok(vec![
            ("o", wide(o.values(&device))),
            ("lse", wide(lse.values(&device))),
        ])
    });
}

#[test]
fn of_attention() {
    attention::<f32>();
    attention::<bf16>();
}
