//! How the kernels that use `column_sum.cuh` are launched.

use crate::abi::{COLUMN_SUM_LANES, COLUMN_SUM_RUN, COLUMN_SUM_TOKEN_LANES, ColumnSumShape};
use crate::launch::{GRID_X, LaunchError, blocks, check_row};

/// Grid and threads for `shape`, which must not be empty.
pub(crate) fn grid(shape: ColumnSumShape) -> Result<[(u32, u32, u32); 2], LaunchError> {
    let features = u64::from(shape.features);
    check_row("features", features)?;
    let run = if shape.features.is_multiple_of(COLUMN_SUM_RUN) {
        COLUMN_SUM_RUN
    } else {
        1
    };
    let columns = u64::from(COLUMN_SUM_LANES * run);
    Ok([
        (blocks("features", features, columns, GRID_X)?, 1, 1),
        (COLUMN_SUM_LANES, COLUMN_SUM_TOKEN_LANES, 1),
    ])
}
