//! The keys and values of earlier tokens, kept while generating.

use crate::{Error, Result, Tensor};

/// Copies `x [n, width]` into the rows of `cache [capacity, width]` from `at_row` on. Both are
/// of one float type.
///
/// # Errors
/// When the rows do not fit, and on shapes and data types that do not fit.
pub fn append(cache: &mut Tensor, at_row: usize, x: &Tensor) -> Result<()> {
    let (capacity, width) = cache.matrix("cache", "[capacity, width]")?;
    let (n, _) = x.matrix("x", "[n, width]")?;
    x.check_shape("x", &[n, width])?;
    x.check_dtype("x", cache.dtype())?;
    x.check_device("x", cache.device())?;
    cache.check_float("cache")?;
    if at_row.checked_add(n).is_none_or(|end| end > capacity) {
        return Err(Error::Argument(format!(
            "cache: {n} rows from row {at_row} on do not fit its {capacity} rows"
        )));
    }
    let offset = at_row * width * x.dtype().size_in_bytes();
    cache.copy_bytes(offset, x, 0..x.size_in_bytes())
}
