//! Tensors keep what they are given.

use bytes::Bytes;
use fuselora_tensor::{DType, Device, Tensor};

#[test]
fn shared_memory_is_not_copied_when_aligned() {
    let cpu = Device::cpu();
    let bytes = Bytes::from_owner(
        [
            1.0f32.to_ne_bytes(),
            2.0f32.to_ne_bytes(),
            3.0f32.to_ne_bytes(),
        ]
        .concat(),
    );
    let offset = bytes.as_ptr().align_offset(4);
    let aligned = bytes.slice(offset..offset + 4);
    let tensor = Tensor::from_shared(&cpu, [1], DType::F32, aligned.clone()).unwrap();
    assert_eq!(tensor.as_f32().unwrap().as_ptr().cast(), aligned.as_ptr());
    assert_eq!(cpu.memory().current, 0);

    let crooked = bytes.slice(offset + 1..offset + 5);
    let tensor = Tensor::from_shared(&cpu, [1], DType::F32, crooked.clone()).unwrap();
    assert_eq!(tensor.to_bytes().unwrap(), crooked);
    assert_eq!(cpu.memory().current, 4);
}

#[test]
fn casts_round_to_nearest_even() {
    let cpu = Device::cpu();
    let tensor = Tensor::from_f32(&cpu, [3], &[1.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0]).unwrap();
    let bf16 = tensor.cast(DType::BF16).unwrap();
    assert_eq!(bf16.to_f32_vec().unwrap(), [1.0, 1.0, 1.0 + 4.0 / 256.0]);
    let f16 = tensor.cast(DType::F16).unwrap();
    assert_eq!(f16.to_f32_vec().unwrap(), tensor.to_f32_vec().unwrap());
    assert_eq!(
        bf16.cast(DType::F16).unwrap().to_f32_vec().unwrap(),
        bf16.to_f32_vec().unwrap()
    );
}

#[test]
fn memory_is_counted_exactly() {
    let cpu = Device::cpu();
    let first = Tensor::zeros(&cpu, [10, 10], DType::F32).unwrap();
    let second = first.cast(DType::F16).unwrap();
    assert_eq!(cpu.memory().current, 600);
    drop(first);
    assert_eq!(cpu.memory().current, 200);
    assert_eq!(cpu.memory().peak, 600);
    cpu.reset_peak();
    assert_eq!(cpu.memory().peak, 200);
    drop(second);
    cpu.trim();
    assert_eq!((cpu.memory().current, cpu.memory().cached), (0, 0));
}
