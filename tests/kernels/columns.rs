//! Columns of a matrix.

use crate::device::{Device, indices};
use crate::storage::{Storage, exact, for_every_storage, stored};
use fuselora_kernels::abi::ColumnBlock;
use fuselora_kernels::columns::{copy, take};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

pub const KERNELS: &[&str] = &[
    "copy_columns_f32",
    "copy_columns_f16",
    "copy_columns_bf16",
    "take_columns_f32",
    "take_columns_f16",
    "take_columns_bf16",
];

fn copies_a_block<T: Storage>(block: ColumnBlock, seed: u64) -> Result<(), TestCaseError> {
    let device = Device::open();
    device.shuffle(seed);
    let [rows, from, to] =
        [block.rows, block.from_columns, block.to_columns].map(|extent| extent as usize);
    let (x, y) = (
        stored::<T>(seed, rows * from),
        stored::<T>(!seed, rows * to),
    );
    let (x_device, mut y_device) = (device.upload(&x), device.upload(&y));
    copy(
        &device.kernels,
        block,
        device.operand(&x_device),
        device.operand_mut(&mut y_device),
    )?;
    // What is beside the block stays.
    let mut expected = y;
    for row in 0..rows {
        for j in 0..block.width as usize {
            expected[row * to + block.to_first as usize + j] =
                x[row * from + block.from_first as usize + j];
        }
    }
    prop_assert_eq!(exact(&device.download(&y_device)), exact(&expected));
    Ok(())
}

fn takes_columns<T: Storage>(
    rows: usize,
    columns: usize,
    n: usize,
    seed: u64,
) -> Result<(), TestCaseError> {
    let device = Device::open();
    device.shuffle(seed);
    let x = stored::<T>(seed, rows * columns);
    let ids = indices(!seed, n, columns);
    let (x_device, ids_device) = (device.upload(&x), device.upload(&ids));
    let mut y = device.output::<T>(rows * n);
    take(
        &device.kernels,
        rows as u32,
        columns as u32,
        device.operand(&x_device),
        device.operand(&ids_device),
        device.operand_mut(&mut y),
    )?;
    let of_row = |row: usize| ids.iter().map(move |&id| row * columns + id as usize);
    let expected: Vec<T> = (0..rows).flat_map(of_row).map(|index| x[index]).collect();
    prop_assert_eq!(exact(&device.download(&y)), exact(&expected));
    Ok(())
}

/// A block within both matrices, in units of `unit` columns.
fn blocks(unit: u32) -> impl Strategy<Value = ColumnBlock> {
    (0u32..9, 1u32..40, 0u32..9, 0u32..9, 0u32..9, 1u32..20).prop_map(
        move |(from_first, width, after, to_first, to_after, rows)| ColumnBlock {
            rows,
            width: unit * width,
            from_columns: unit * (from_first + width + after),
            from_first: unit * from_first,
            to_columns: unit * (to_first + width + to_after),
            to_first: unit * to_first,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn blocks_move(block in prop_oneof![blocks(1), blocks(8)], seed: u64) {
        for_every_storage!(copies_a_block(block, seed));
    }

    #[test]
    fn columns_are_taken(rows in 1usize..9, columns in 1usize..50, n in 1usize..300, seed: u64) {
        for_every_storage!(takes_columns(rows, columns, n, seed));
    }
}

#[test]
fn a_column_beyond_the_row_is_a_fault() {
    let device = Device::open();
    let (x, ids) = (device.upload(&[1.0f32; 8]), device.upload(&[4u32]));
    let mut y = device.output::<f32>(2);
    let launched = take(
        &device.kernels,
        2,
        4,
        device.operand(&x),
        device.operand(&ids),
        device.operand_mut(&mut y),
    );
    // A GPU tells of it at the next call that waits.
    assert!(launched.is_err() || device.kernels.stream().synchronize().is_err());
}

#[test]
fn a_block_beyond_the_row_is_refused() {
    let device = Device::open();
    let x = device.upload(&[1.0f32; 8]);
    let mut y = device.output::<f32>(8);
    let block = ColumnBlock {
        rows: 2,
        width: 3,
        from_columns: 4,
        from_first: 2,
        to_columns: 4,
        to_first: 0,
    };
    let error = copy(
        &device.kernels,
        block,
        device.operand(&x),
        device.operand_mut(&mut y),
    );
    assert_eq!(
        error.unwrap_err().to_string(),
        "from_first is 2: the block must end within the row"
    );
}
