//! Captured work is done again as it was, and only while that is right.

use crate::device;
use fuselora_tensor::{
    DType, Device, Error, Graph, Purpose, Result, Tensor,
    ops::{elementwise, gather, swiglu},
};

/// A device of its own, because a capture allows no other use meanwhile.
fn own_device() -> Device {
    let _ = device();
    Device::cuda(0).unwrap()
}

fn lasting(device: &Device, values: &[f32]) -> Tensor {
    let _holding = device.hold(Purpose::Graphs);
    Tensor::from_f32(device, [values.len() / 4, 4], values).unwrap()
}

/// `y = silu(x)·x + x`, through memory of its own.
fn work(x: &Tensor, y: &mut Tensor) -> Result<()> {
    let gated = swiglu::forward(x, x)?;
    y.copy_from(&gated)?;
    elementwise::add_assign(y, x)
}

/// Captures `work`, which is done once before.
fn captured(device: &Device, mut work: impl FnMut() -> Result<()>) -> Graph {
    work().unwrap();
    device.capture(&mut work).unwrap()
}

#[test]
fn it_reads_what_is_there_when_it_is_launched() {
    let device = own_device();
    assert!(device.captures());
    let mut x = lasting(&device, &[0.5; 8]);
    let mut y = lasting(&device, &[0.0; 8]);
    let graph = captured(&device, || work(&x, &mut y));
    for value in [1.0, -2.0, 3.0] {
        x.set_f32(&[value; 8]).unwrap();
        y.fill_zero().unwrap();
        assert!(graph.launch().unwrap());
        let found = y.to_bytes().unwrap();
        work(&x, &mut y).unwrap();
        assert_eq!(found, y.to_bytes().unwrap());
    }
}

#[test]
fn nothing_is_done_while_it_is_captured() {
    let device = own_device();
    let x = lasting(&device, &[1.0; 8]);
    let mut y = lasting(&device, &[0.0; 8]);
    work(&x, &mut y).unwrap();
    y.fill_zero().unwrap();
    device.capture(|| work(&x, &mut y)).unwrap();
    assert_eq!(y.to_f32_vec().unwrap(), [0.0; 8]);
}

#[test]
fn its_memory_may_be_lent_while_it_rests() {
    let device = own_device();
    let x = lasting(&device, &[1.0; 8]);
    let mut y = lasting(&device, &[0.0; 8]);
    let graph = captured(&device, || work(&x, &mut y));
    let before = device.memory();
    let other = Tensor::zeros(&device, [2, 4], DType::F32).unwrap();
    assert_eq!(device.memory().cached, before.cached - 64, "it is lent");
    assert!(!graph.launch().unwrap(), "another has its memory");
    assert_eq!(other.to_f32_vec().unwrap(), [0.0; 8]);
    drop(other);
    assert!(graph.launch().unwrap());
    // What lasts never takes it.
    let _lasting = lasting(&device, &[7.0; 8]);
    assert!(graph.launch().unwrap());
    device.trim();
    assert!(!graph.launch().unwrap(), "its memory is freed");
}

#[test]
fn a_tensor_that_it_uses_must_live() {
    let device = own_device();
    let x = lasting(&device, &[1.0; 8]);
    let mut y = lasting(&device, &[0.0; 8]);
    let graph = captured(&device, || work(&x, &mut y));
    drop(x);
    let _same_memory = lasting(&device, &[2.0; 8]);
    assert!(!graph.launch().unwrap());
}

#[test]
fn what_it_holds_while_it_runs_counts_for_the_peak() {
    let device = own_device();
    let x = lasting(&device, &[1.0; 8]);
    let mut y = lasting(&device, &[0.0; 8]);
    let graph = captured(&device, || work(&x, &mut y));
    let usual = device.memory();
    device.reset_peak();
    assert_eq!(device.memory().peak, device.memory().current);
    assert!(graph.launch().unwrap());
    assert_eq!(device.memory().peak, usual.peak);
    assert_eq!(device.memory().held_at_peak, usual.held_at_peak);
    assert_eq!(device.memory().current, usual.current);
}

#[test]
fn indices_are_checked_at_each_launch() {
    let device = own_device();
    let _holding = device.hold(Purpose::Graphs);
    let table = Tensor::from_f32(&device, [3, 4], &[1.0; 12]).unwrap();
    let mut ids = Tensor::from_u32(&device, [2], &[0, 1]).unwrap();
    let mut rows = Tensor::zeros(&device, [2, 4], DType::F32).unwrap();
    drop(_holding);
    let graph = captured(&device, || rows.copy_from(&gather::rows(&table, &ids)?));
    ids.set_u32(&[2, 0]).unwrap();
    assert!(graph.launch().unwrap());
    ids.set_u32(&[2, 3]).unwrap();
    let message = graph.launch().unwrap_err().to_string();
    assert_eq!(message, "ids: the index 3 at position 1 is not below 3");
}

#[test]
fn what_cannot_be_captured_is_said_and_harms_nothing() {
    let device = own_device();
    let x = lasting(&device, &[1.0; 8]);
    let mut y = lasting(&device, &[0.0; 8]);
    let refused = |work: &mut dyn FnMut() -> Result<()>| match device.capture(work) {
        Err(Error::NotCaptured(why)) => why,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was captured"),
    };
    drop(Tensor::from_f32(&device, [1], &[1.0]).unwrap());
    let why = refused(&mut || Tensor::from_f32(&device, [1], &[1.0]).map(drop));
    assert_eq!(why, "values are copied from the host");
    let why = refused(&mut || x.to_f32_vec().map(drop));
    assert_eq!(why, "the host reads values");
    let why = refused(&mut || device.synchronize());
    assert_eq!(why, "the host waits for the device");
    let why = refused(&mut || device.capture(|| Ok::<(), Error>(())).map(drop));
    assert_eq!(why, "another capture has not ended");
    let mut kept = None;
    drop(swiglu::forward(&x, &x).unwrap());
    let why = refused(&mut || {
        kept = Some(swiglu::forward(&x, &x)?);
        Ok(())
    });
    assert_eq!(why, "a tensor that it made outlives it");
    drop(kept);
    assert!(captured(&device, || work(&x, &mut y)).launch().unwrap());
    let on_cpu = Device::cpu().capture(|| Ok::<(), Error>(()));
    assert!(matches!(on_cpu, Err(Error::NotCaptured(_))));
}

#[test]
fn memory_that_was_never_there_is_not_captured() {
    let device = own_device();
    let x = lasting(&device, &[1.0; 8]);
    let mut y = lasting(&device, &[0.0; 8]);
    let captured = device.capture(|| work(&x, &mut y));
    assert!(matches!(captured, Err(Error::OutOfMemory { .. })));
    work(&x, &mut y).unwrap();
    let graph = device.capture(|| work(&x, &mut y)).unwrap();
    assert!(graph.launch().unwrap());
}

/// What is cached makes room first, also what a graph would use; the graph then says that it cannot be repeated.
#[test]
fn out_of_memory_ends_graphs_before_anything_else() {
    let device = own_device();
    let x = lasting(&device, &[1.0; 8]);
    let mut y = lasting(&device, &[0.0; 8]);
    let graph = captured(&device, || work(&x, &mut y));
    assert!(device.memory().cached > 0);
    let message = Tensor::empty(&device, [1 << 40], DType::F32)
        .unwrap_err()
        .to_string();
    assert!(
        message.ends_with("these are held: graphs 64 bytes"),
        "{message}"
    );
    assert_eq!(device.memory().cached, 0);
    assert!(!graph.launch().unwrap());
    assert!(captured(&device, || work(&x, &mut y)).launch().unwrap());
}
