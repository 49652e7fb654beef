//! Rows by index.

use crate::device::{Device, indices, numbers};
use crate::storage::{Storage, exact, for_every_storage, stored};
use fuselora_kernels::abi::EmbeddingShape;
use fuselora_kernels::embedding::{gather, gather_transposed, scatter_add, scatter_add_transposed};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

pub const KERNELS: &[&str] = &[
    "gather_f32",
    "gather_f16",
    "gather_bf16",
    "scatter_add_f32",
    "scatter_add_f16",
    "scatter_add_bf16",
    "gather_transposed",
    "scatter_add_transposed",
];

fn gathers_and_scatters<T: Storage>(
    rows: usize,
    width: usize,
    n: usize,
    seed: u64,
) -> Result<(), TestCaseError> {
    let device = Device::open();
    device.shuffle(seed);
    let table = stored::<T>(seed, rows * width);
    let ids = indices(!seed, n, rows);
    let shape = EmbeddingShape {
        rows: rows as u32,
        width: width as u32,
    };
    let (mut table_device, ids_device) = (device.upload(&table), device.upload(&ids));

    let mut y = device.output::<T>(n * width);
    gather(
        &device.kernels,
        shape,
        device.operand(&table_device),
        device.operand(&ids_device),
        device.operand_mut(&mut y),
    )?;
    let expected: Vec<T> = ids
        .iter()
        .flat_map(|&id| table[id as usize * width..][..width].to_vec())
        .collect();
    prop_assert_eq!(exact(&device.download(&y)), exact(&expected));

    // f32 sums in the order of the ids, then one rounding.
    let dy = stored::<T>(seed ^ 1, n * width);
    let dy_device = device.upload(&dy);
    scatter_add(
        &device.kernels,
        shape,
        device.operand(&dy_device),
        device.operand(&ids_device),
        device.operand_mut(&mut table_device),
    )?;
    let mut sums: Vec<f32> = table.iter().map(|x| x.value() as f32).collect();
    for (i, &id) in ids.iter().enumerate() {
        for j in 0..width {
            sums[id as usize * width + j] += dy[i * width + j].value() as f32;
        }
    }
    let expected: Vec<T> = sums.into_iter().map(T::of).collect();
    prop_assert_eq!(exact(&device.download(&table_device)), exact(&expected));
    Ok(())
}

/// Rows of a table that is held `[width, rows]`.
fn of_a_transposed_table(
    rows: usize,
    width: usize,
    n: usize,
    seed: u64,
) -> Result<(), TestCaseError> {
    let device = Device::open();
    device.shuffle(seed);
    let (table, dy) = (numbers(seed, rows * width), numbers(seed ^ 1, n * width));
    let ids = indices(!seed, n, rows);
    let shape = EmbeddingShape {
        rows: rows as u32,
        width: width as u32,
    };
    let (mut table_device, ids_device) = (device.upload(&table), device.upload(&ids));
    let dy_device = device.upload(&dy);
    let mut y = device.output::<f32>(n * width);
    gather_transposed(
        &device.kernels,
        shape,
        device.operand(&table_device),
        device.operand(&ids_device),
        device.operand_mut(&mut y),
    )?;
    let row = |id: u32| (0..width).map(move |column| column * rows + id as usize);
    let expected: Vec<f32> = ids
        .iter()
        .flat_map(|&id| row(id))
        .map(|i| table[i])
        .collect();
    prop_assert_eq!(device.download(&y), expected);

    scatter_add_transposed(
        &device.kernels,
        shape,
        device.operand(&dy_device),
        device.operand(&ids_device),
        device.operand_mut(&mut table_device),
    )?;
    let mut expected = table;
    for (&id, dy) in ids.iter().zip(dy.chunks(width)) {
        row(id).zip(dy).for_each(|(i, dy)| expected[i] += dy);
    }
    prop_assert_eq!(device.download(&table_device), expected);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn rows_of_a_transposed_table_are_moved_and_added(
        rows in 1usize..30, width in 1usize..300, n in 1usize..40, seed: u64,
    ) {
        of_a_transposed_table(rows, width, n, seed)?;
    }

    #[test]
    fn rows_are_moved_and_added(rows in 1usize..30, width in prop_oneof![1usize..70, Just(64), Just(256)], n in 1usize..40, seed: u64) {
        for_every_storage!(gathers_and_scatters(rows, width, n, seed));
    }
}

#[test]
fn an_id_beyond_the_table_is_a_fault() {
    let device = Device::open();
    let table = device.upload(&[1.0f32; 8]);
    let ids = device.upload(&[2u32]);
    let mut y = device.output::<f32>(4);
    let shape = EmbeddingShape { rows: 2, width: 4 };
    let launched = gather(
        &device.kernels,
        shape,
        device.operand(&table),
        device.operand(&ids),
        device.operand_mut(&mut y),
    );
    // A GPU tells of it at the next call that waits.
    assert!(launched.is_err() || device.kernels.stream().synchronize().is_err());
}
