//! Tensors on a CUDA device keep what they are given, and its memory is counted.

use crate::device;
use fuselora_tensor::{DType, Device, Purpose, Tensor, Weight};

#[test]
fn elements_survive_the_way_there_and_back() {
    let device = device();
    let values: Vec<f32> = (0..1000).map(|i| i as f32 / 7.0).collect();
    let tensor = Tensor::from_f32(&device, [10, 100], &values).unwrap();
    assert_eq!(tensor.to_f32_vec().unwrap(), values);
    assert_eq!(tensor.element_count(), 1000);
    let copy = tensor.try_clone().unwrap();
    drop(tensor);
    assert_eq!(copy.to_f32_vec().unwrap(), values);
    let on_cpu = copy.to_device(&Device::cpu()).unwrap();
    assert_eq!(on_cpu.as_f32().unwrap(), values);

    let halves = copy.cast(DType::F16).unwrap();
    let expected = on_cpu.cast(DType::F16).unwrap();
    assert!(!halves.device().is_cpu());
    assert_eq!(halves.to_bytes().unwrap(), expected.to_bytes().unwrap());

    let mut zeros = Tensor::zeros(&device, [10, 100], DType::F32).unwrap();
    assert_eq!(zeros.to_f32_vec().unwrap(), [0.0; 1000]);
    zeros.copy_from(&on_cpu).unwrap();
    assert_eq!(zeros.to_f32_vec().unwrap(), values);

    let ids = Tensor::from_u32(&device, [3], &[7, 9, 8]).unwrap();
    assert_eq!(ids.to_u32_vec().unwrap(), [7, 9, 8]);
    let none = Tensor::from_f32(&device, [0, 4], &[]).unwrap();
    assert!(none.to_f32_vec().unwrap().is_empty());
}

#[test]
fn the_host_cannot_look_into_it() {
    let mut tensor = Tensor::full_f32(&device(), [2, 3], 1.0).unwrap();
    let message = tensor.as_f32().unwrap_err().to_string();
    assert_eq!(message, "tensor: expected on the cpu, found on cuda:0");
    assert!(tensor.as_f32_mut().is_err());
    let rows = Weight::Dense(tensor).rows_f32(0..1, &mut [0.0; 3]);
    assert!(
        rows.unwrap_err()
            .to_string()
            .contains("weight: expected on the cpu")
    );
}

#[test]
fn memory_is_counted_by_purpose() {
    // Another handle, because the other tests use the shared one at the same time.
    let _ = device();
    let device = Device::cuda(0).unwrap();
    let weights = {
        let _holding = device.hold(Purpose::Weights);
        Tensor::zeros(&device, [100], DType::F32).unwrap()
    };
    let activations = Tensor::zeros(&device, [10], DType::F16).unwrap();
    let memory = device.memory();
    assert_eq!((memory.current, memory.peak), (420, 420));
    assert_eq!(
        memory.held.to_string(),
        "weights 400 bytes, activations 20 bytes"
    );
    drop(activations);
    assert_eq!((device.memory().current, device.memory().peak), (400, 420));
    assert!(device.memory().cached > 0);
    drop(weights);
    device.trim();
    assert_eq!((device.memory().current, device.memory().cached), (0, 0));
}

#[test]
fn what_it_has_no_room_for_is_said_with_what_fills_it() {
    let _ = device();
    let device = Device::cuda(0).unwrap();
    let _weights = {
        let _holding = device.hold(Purpose::Weights);
        Tensor::zeros(&device, [3 << 20], DType::U8).unwrap()
    };
    let message = Tensor::empty(&device, [1 << 40], DType::F32)
        .unwrap_err()
        .to_string();
    assert_eq!(
        message,
        "out of memory: no room for 4194304 MiB more on cuda:0, where these are held: weights 3 MiB"
    );
}

#[test]
fn a_device_that_is_not_there() {
    let _ = device();
    let message = Device::cuda(7).unwrap_err().to_string();
    assert_eq!(
        message,
        "there is no device cuda:7: this machine has 1, counted from cuda:0"
    );
    assert_eq!(Device::cuda_count(), 1);
}
