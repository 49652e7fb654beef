//! Work that a device does again.

#[cfg(not(feature = "cuda"))]
use std::convert::Infallible as Captured;

use crate::Result;
#[cfg(feature = "cuda")]
use crate::cuda::graph::Captured;

/// Work captured by [`Device::capture`](crate::Device::capture), which one launch does again: a CUDA graph.
///
/// It reads and writes the tensors that were there when it was captured, and for its own tensors uses memory that
/// others may have in the meantime. So it holds no memory, but can be repeated only while those tensors live, and while
/// what it used is neither in use nor given back to the driver.
pub struct Graph(Captured);

impl Graph {
    #[cfg(feature = "cuda")]
    pub(crate) fn of_cuda(captured: Captured) -> Graph {
        Graph(captured)
    }

    /// Does the work again, if it can be repeated; returns whether it can.
    ///
    /// # Errors
    /// When a tensor of indices, filled anew since, has one that is not allowed, or the device has failed.
    pub fn launch(&self) -> Result<bool> {
        #[cfg(feature = "cuda")]
        return self.0.launch();
        #[cfg(not(feature = "cuda"))]
        match self.0 {}
    }
}
