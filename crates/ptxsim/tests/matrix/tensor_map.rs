//! The pieces of a box against the definition: element by element, coordinate by coordinate.

use proptest::prelude::*;
use ptxsim::matrix::swizzle::Swizzle;
use ptxsim::matrix::tensor_map::TensorMap;
use std::collections::HashMap;

const SWIZZLES: [Swizzle; 4] = [
    Swizzle::None,
    Swizzle::Bytes32,
    Swizzle::Bytes64,
    Swizzle::Bytes128,
];

fn map() -> impl Strategy<Value = (TensorMap, [i32; 5])> {
    let sizes = (
        1usize..6,
        proptest::sample::select(vec![1u32, 2, 4, 8]),
        proptest::array::uniform5(1u64..12),
        proptest::array::uniform5(1u32..4),
        proptest::array::uniform5(1u32..3),
        proptest::array::uniform5(-4i32..12),
        0usize..4,
        1u32..9,
    );
    sizes.prop_map(
        |(rank, element_bytes, mut dims, mut box_dims, mut steps, corner, mode, chunks)| {
            let swizzle = SWIZZLES[mode];
            let limit = if swizzle == Swizzle::None {
                8
            } else {
                swizzle.row_bytes() / 16
            };
            box_dims[0] = chunks.min(limit) * 16 / element_bytes;
            dims[0] *= 3;
            steps[0] = 1;
            let mut strides = [u64::from(element_bytes); 5];
            for d in 1..5 {
                let below = if d == 1 {
                    dims[0] * strides[0]
                } else {
                    dims[d - 1] * strides[d - 1]
                };
                strides[d] = below.next_multiple_of(16) + 16;
            }
            let map = TensorMap {
                element_bytes,
                rank,
                address: 0x4000,
                dims,
                strides,
                box_dims,
                element_strides: steps,
                swizzle,
                nan_fill: false,
            };
            (map, corner)
        },
    )
}

/// The documented swizzles: the 16-byte chunk of a row is exchanged with the number of its 128-byte line.
fn swizzled(address: u32, swizzle: Swizzle) -> u32 {
    let (line, chunk, byte) = (address / 128, address / 16 % 8, address % 16);
    let chunk = match swizzle {
        Swizzle::None => chunk,
        Swizzle::Bytes32 => chunk ^ (line % 2),
        Swizzle::Bytes64 => chunk ^ (line % 4),
        Swizzle::Bytes128 => chunk ^ (line % 8),
    };
    line * 128 + chunk * 16 + byte
}

proptest! {
    #[test]
    fn boxes_hold_their_elements((map, corner) in map()) {
        map.validate().expect("valid");
        let shared = 1024;
        let mut got = HashMap::new();
        for piece in map.pieces(corner, shared) {
            for byte in 0..piece.bytes {
                let global = piece.global.map(|global| global + u64::from(byte));
                prop_assert!(got.insert(piece.shared + byte, global).is_none(), "a byte twice");
            }
        }
        prop_assert_eq!(got.len() as u32, map.box_bytes());
        // Count through the box as nested loops would, dimension 0 innermost.
        let mut at = [0u32; 5];
        let mut linear = 0;
        'elements: loop {
            let place: Vec<i64> = (0..map.rank)
                .map(|d| i64::from(corner[d]) + i64::from(at[d]))
                .collect();
            let inside = (0..map.rank).all(|d| (0..map.dims[d] as i64).contains(&place[d]));
            let offset: i64 = (0..map.rank).map(|d| place[d] * map.strides[d] as i64).sum();
            for byte in 0..map.element_bytes {
                let expected = inside.then(|| (map.address as i64 + offset) as u64 + u64::from(byte));
                let to = swizzled(shared + linear * map.element_bytes + byte, map.swizzle);
                prop_assert_eq!(got[&to], expected);
            }
            linear += 1;
            for (d, at) in at.iter_mut().enumerate().take(map.rank) {
                *at += map.element_strides[d];
                if *at < map.box_dims[d] {
                    continue 'elements;
                }
                *at = 0;
            }
            break;
        }
    }

    #[test]
    fn maps_survive_their_encoding((map, _) in map()) {
        prop_assert_eq!(TensorMap::decode(&map.encode()), Ok(map));
    }
}

#[test]
fn limits_are_checked() {
    let valid = TensorMap {
        element_bytes: 2,
        rank: 2,
        address: 256,
        dims: [64, 64, 1, 1, 1],
        strides: [2, 128, 0, 0, 0],
        box_dims: [64, 8, 1, 1, 1],
        element_strides: [1; 5],
        swizzle: Swizzle::Bytes128,
        nan_fill: true,
    };
    assert_eq!(valid.validate(), Ok(()));
    assert_eq!(valid.fill()[..4], [0xff, 0x7f, 0xff, 0x7f]);
    for (wrong, word) in [
        (
            TensorMap {
                rank: 6,
                ..valid.clone()
            },
            "rank",
        ),
        (
            TensorMap {
                address: 264,
                ..valid.clone()
            },
            "address",
        ),
        (
            TensorMap {
                strides: [2, 120, 0, 0, 0],
                ..valid.clone()
            },
            "stride",
        ),
        (
            TensorMap {
                box_dims: [64, 300, 1, 1, 1],
                ..valid.clone()
            },
            "box",
        ),
        (
            TensorMap {
                box_dims: [4, 8, 1, 1, 1],
                ..valid.clone()
            },
            "box rows",
        ),
        (
            TensorMap {
                swizzle: Swizzle::Bytes64,
                ..valid.clone()
            },
            "swizzle",
        ),
        (
            TensorMap {
                dims: [0, 64, 1, 1, 1],
                ..valid.clone()
            },
            "dimension 0",
        ),
    ] {
        let message = wrong.validate().expect_err("invalid").to_string();
        assert!(message.contains(word), "{message}");
    }
    assert!(TensorMap::decode(&[0; 128]).is_err());
}
