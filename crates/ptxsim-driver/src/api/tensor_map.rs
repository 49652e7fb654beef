//! Tensor maps, in the encoding that the simulator's tensor copies read.

use crate::error::CuResult;
use crate::pointer::{In, Out};
use crate::state::{report, with_driver};
use ptxsim::matrix::swizzle::Swizzle;
use ptxsim::matrix::tensor_map::{MAX_RANK, TensorMap};

/// Bytes of each `CUtensorMapDataType`, in order.
const ELEMENT_BYTES: [u32; 13] = [1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4];

#[unsafe(no_mangle)]
pub extern "C" fn cuTensorMapEncodeTiled(
    map: Out<[u8; 128]>,
    data_type: u32,
    rank: u32,
    address: u64,
    dims: In<u64>,
    strides: In<u64>,
    box_dims: In<u32>,
    element_strides: In<u32>,
    interleave: u32,
    swizzle: u32,
    _l2_promotion: u32,
    out_of_bounds: u32,
) -> CuResult {
    with_driver(|driver| {
        if driver.gpu.profile().compute_capability.0 < 9 || interleave != 0 {
            return Err(CuResult::ERROR_NOT_SUPPORTED);
        }
        let rank = rank as usize;
        let element_bytes = ELEMENT_BYTES.get(data_type as usize).copied();
        let element_bytes = element_bytes.ok_or(CuResult::ERROR_INVALID_VALUE)?;
        if !(1..=MAX_RANK).contains(&rank) {
            return Err(CuResult::ERROR_INVALID_VALUE);
        }
        let mut tensor_map = TensorMap {
            element_bytes,
            rank,
            address,
            dims: [1; MAX_RANK],
            strides: [0; MAX_RANK],
            box_dims: [1; MAX_RANK],
            element_strides: [1; MAX_RANK],
            swizzle: match swizzle {
                0 => Swizzle::None,
                1 => Swizzle::Bytes32,
                2 => Swizzle::Bytes64,
                3 => Swizzle::Bytes128,
                _ => return Err(CuResult::ERROR_NOT_SUPPORTED),
            },
            nan_fill: out_of_bounds != 0,
        };
        tensor_map.dims[..rank].copy_from_slice(dims.slice(rank)?);
        tensor_map.strides[0] = u64::from(element_bytes);
        tensor_map.strides[1..rank].copy_from_slice(strides.slice(rank - 1)?);
        tensor_map.box_dims[..rank].copy_from_slice(box_dims.slice(rank)?);
        tensor_map.element_strides[..rank].copy_from_slice(element_strides.slice(rank)?);
        tensor_map.validate().map_err(|error| {
            report(error.to_string());
            CuResult::ERROR_INVALID_VALUE
        })?;
        map.set(tensor_map.encode())
    })
}
