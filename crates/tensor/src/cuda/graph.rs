//! Captured work.

use super::{Cuda, LargestIndex, describe};
use crate::{Error, Result, check, pool::Recorded};
use cudarc::driver::{
    CudaGraph,
    sys::{
        CUgraphInstantiate_flags, CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
    },
};
use std::sync::Arc;

/// What is noted while work is captured.
#[derive(Default)]
pub(super) struct Capturing {
    indices: Vec<IndexCheck>,
}

/// A check of indices, to be repeated when they may be others.
struct IndexCheck {
    name: String,
    largest: LargestIndex,
    limit: usize,
}

/// Captured work, with all that its repetition needs.
pub(crate) struct Captured {
    cuda: Arc<Cuda>,
    graph: CudaGraph,
    memory: Recorded,
    indices: Vec<IndexCheck>,
    kernels: Arc<[&'static str]>,
}

/// Ends a capture whatever happens.
struct Session<'a> {
    cuda: &'a Arc<Cuda>,
    is_open: bool,
}

impl Cuda {
    pub fn capture<E: From<Error>>(
        self: &Arc<Cuda>,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Captured, E> {
        let session = Session::begin(self)?;
        work()?;
        Ok(session.end()?)
    }

    pub fn note_index_check(&self, name: &str, largest: &LargestIndex, limit: usize) {
        if let Some(capturing) = &mut self.work().capturing {
            capturing.indices.push(IndexCheck {
                name: name.into(),
                largest: largest.clone(),
                limit,
            });
        }
    }
}

impl<'a> Session<'a> {
    fn begin(cuda: &'a Arc<Cuda>) -> Result<Session<'a>> {
        if !cuda.pool.start_recording() {
            return Err(Error::NotCaptured("another capture has not ended".into()));
        }
        let mut session = Session {
            cuda,
            is_open: false,
        };
        let begun = cuda
            .stream()
            .begin_capture(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
        begun.map_err(|error| Error::NotCaptured(describe(error)))?;
        session.is_open = true;
        cuda.kernels.start_noting();
        cuda.work().capturing = Some(Capturing::default());
        Ok(session)
    }

    fn end(mut self) -> Result<Captured> {
        self.is_open = false;
        let ended = self.cuda.stream().end_capture(CUgraphInstantiate_flags(0));
        let graph = ended
            .map_err(|error| Error::NotCaptured(describe(error)))?
            .ok_or_else(|| Error::NotCaptured("the driver made no graph of it".into()))?;
        let memory = self.cuda.pool.stop_recording();
        if !memory.is_closed() {
            let why = "a tensor that it made outlives it";
            return Err(Error::NotCaptured(why.into()));
        }
        let capturing = self.cuda.work().capturing.take().unwrap_or_default();
        Ok(Captured {
            cuda: self.cuda.clone(),
            graph,
            memory,
            indices: capturing.indices,
            kernels: self.cuda.kernels.stop_noting().into(),
        })
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        if self.is_open {
            // The work failed: what was captured of it is of no use.
            let _ = self.cuda.stream().end_capture(CUgraphInstantiate_flags(0));
        }
        self.cuda.pool.stop_recording();
        self.cuda.work().capturing = None;
        self.cuda.kernels.stop_noting();
    }
}

impl Captured {
    pub fn launch(&self) -> Result<bool> {
        for IndexCheck {
            name,
            largest,
            limit,
        } in &self.indices
        {
            check::largest(name, largest.get(), *limit)?;
        }
        self.cuda.pool.repeat(&self.memory, || {
            self.cuda.work().graph = Some(self.kernels.clone());
            let launched = self.graph.launch();
            launched.map_err(|error| self.cuda.fault(error))
        })
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        // The driver may not lose the graph while the device still runs it. A failure shows at the next call.
        let _ = self.cuda.synchronize();
    }
}
