//! Graphs: work that a stream was given while it was capturing, in the order of the calls.
//!
//! That order is one that the streams and events allow, so a graph needs no edges: it runs from
//! first to last. Which stream belongs to a capture, and whether all have joined it again, is
//! checked as CUDA does.

use crate::error::CuResult;
use crate::state::{Context, Driver, Handle, Table, lock};
use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;

/// One piece of a graph: what it does each time.
pub type Work = Arc<dyn Fn(&Driver, &Context) -> Result<(), CuResult> + Send + Sync>;

/// The work of a capture that has ended.
pub struct Graph {
    pub context: Handle,
    pub work: Vec<Work>,
}

/// `CUstreamCaptureMode`: which calls that could wait for a capture are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Those of every thread.
    Global,
    /// Those of the capturing thread.
    ThreadLocal,
    /// None.
    Relaxed,
}

impl Mode {
    pub fn of(number: u32) -> Result<Mode, CuResult> {
        match number {
            0 => Ok(Mode::Global),
            1 => Ok(Mode::ThreadLocal),
            2 => Ok(Mode::Relaxed),
            _ => Err(CuResult::ERROR_INVALID_VALUE),
        }
    }
}

thread_local! {
    /// What `cuThreadExchangeStreamCaptureMode` set.
    pub static THREAD_MODE: Cell<Mode> = const { Cell::new(Mode::Global) };
}

/// A capture that has begun.
pub struct Capture {
    context: Handle,
    origin: Handle,
    /// Whether the origin waits for the legacy default stream.
    blocking: bool,
    mode: Mode,
    thread: ThreadId,
    progress: Mutex<Progress>,
}

#[derive(Default)]
struct Progress {
    work: Vec<Work>,
    /// Calls on each stream so far.
    calls: HashMap<Handle, usize>,
    /// Streams other than the origin whose last calls nobody has waited for.
    open: HashSet<Handle>,
    invalid: bool,
    ended: bool,
}

/// An event's place in a capture.
#[derive(Clone)]
pub struct Mark {
    capture: Arc<Capture>,
    stream: Handle,
    /// Calls on the stream before it.
    calls: usize,
}

impl Capture {
    fn add(&self, stream: Handle, work: Work) -> Result<(), CuResult> {
        let mut progress = lock(&self.progress);
        if progress.invalid {
            return Err(CuResult::ERROR_STREAM_CAPTURE_INVALIDATED);
        }
        progress.work.push(work);
        self.touch(&mut progress, stream);
        Ok(())
    }

    fn touch(&self, progress: &mut Progress, stream: Handle) {
        *progress.calls.entry(stream).or_default() += 1;
        if stream != self.origin {
            progress.open.insert(stream);
        }
    }

    fn invalidate(&self) {
        lock(&self.progress).invalid = true;
    }

    pub fn is_invalid(&self) -> bool {
        lock(&self.progress).invalid
    }
}

/// The captures in progress and what came of others.
pub struct Captures {
    /// By stream.
    streams: Mutex<HashMap<Handle, Arc<Capture>>>,
    pub graphs: Table<Graph>,
    pub executables: Table<Graph>,
}

impl Captures {
    pub fn new() -> Captures {
        Captures {
            streams: Mutex::default(),
            graphs: Table::new(),
            executables: Table::new(),
        }
    }

    /// The capture that a stream takes part in.
    pub fn of(&self, stream: Handle) -> Option<Arc<Capture>> {
        lock(&self.streams).get(&stream).cloned()
    }

    pub fn begin(
        &self,
        context: Handle,
        stream: Handle,
        blocking: bool,
        mode: Mode,
    ) -> Result<(), CuResult> {
        // The legacy default stream waits for all others.
        if stream <= 1 {
            return Err(CuResult::ERROR_STREAM_CAPTURE_UNSUPPORTED);
        }
        let mut streams = lock(&self.streams);
        if streams.contains_key(&stream) {
            return Err(CuResult::ERROR_ILLEGAL_STATE);
        }
        let capture = Capture {
            context,
            origin: stream,
            blocking,
            mode,
            thread: std::thread::current().id(),
            progress: Mutex::default(),
        };
        streams.insert(stream, Arc::new(capture));
        Ok(())
    }

    /// Ends the capture that began on `stream`, whatever becomes of it.
    pub fn end(&self, stream: Handle) -> Result<Graph, CuResult> {
        let capture = self.of(stream).ok_or(CuResult::ERROR_ILLEGAL_STATE)?;
        if capture.origin != stream {
            return Err(CuResult::ERROR_STREAM_CAPTURE_UNMATCHED);
        }
        if capture.mode != Mode::Relaxed && capture.thread != std::thread::current().id() {
            return Err(CuResult::ERROR_STREAM_CAPTURE_WRONG_THREAD);
        }
        lock(&self.streams).retain(|_, other| !Arc::ptr_eq(other, &capture));
        let mut progress = lock(&capture.progress);
        progress.ended = true;
        if progress.invalid {
            return Err(CuResult::ERROR_STREAM_CAPTURE_INVALIDATED);
        }
        if !progress.open.is_empty() {
            return Err(CuResult::ERROR_STREAM_CAPTURE_UNJOINED);
        }
        Ok(Graph {
            context: capture.context,
            work: std::mem::take(&mut progress.work),
        })
    }

    /// Where an event that is recorded on `stream` stands in a capture.
    pub fn mark(&self, stream: Handle) -> Option<Mark> {
        let capture = self.of(stream)?;
        let calls = lock(&capture.progress).calls.get(&stream).copied();
        Some(Mark {
            capture,
            stream,
            calls: calls.unwrap_or(0),
        })
    }

    /// `stream` waits for an event. One of a capture makes the stream part of it.
    pub fn wait(
        &self,
        stream: Handle,
        event: Option<Mark>,
        recorded: bool,
    ) -> Result<(), CuResult> {
        let Some(mark) = event else {
            return match self.of(stream) {
                // Recorded before the capture, and so outside of it.
                Some(capture) if recorded => {
                    capture.invalidate();
                    Err(CuResult::ERROR_STREAM_CAPTURE_ISOLATION)
                }
                _ => Ok(()),
            };
        };
        let mut streams = lock(&self.streams);
        let own = streams
            .entry(stream)
            .or_insert_with(|| mark.capture.clone());
        if !Arc::ptr_eq(own, &mark.capture) {
            own.invalidate();
            mark.capture.invalidate();
            return Err(CuResult::ERROR_STREAM_CAPTURE_MERGE);
        }
        let mut progress = lock(&mark.capture.progress);
        if progress.ended {
            streams.remove(&stream);
            return Err(CuResult::ERROR_CAPTURED_EVENT);
        }
        let complete = progress.calls.get(&mark.stream).copied().unwrap_or(0) == mark.calls;
        if mark.stream != stream && complete {
            progress.open.remove(&mark.stream);
        }
        mark.capture.touch(&mut progress, stream);
        Ok(())
    }

    /// A call that waits for a stream's work, which a capture never does.
    pub fn refuse_wait(&self, stream: Handle) -> Result<(), CuResult> {
        match self.of(stream) {
            Some(capture) => {
                capture.invalidate();
                Err(CuResult::ERROR_STREAM_CAPTURE_UNSUPPORTED)
            }
            None => self.refuse_legacy(stream),
        }
    }

    /// The legacy default stream waits for blocking streams, so it may not be used meanwhile.
    fn refuse_legacy(&self, stream: Handle) -> Result<(), CuResult> {
        let streams = lock(&self.streams);
        let blocking = streams.values().find(|capture| capture.blocking);
        match blocking.filter(|_| stream <= 1) {
            Some(capture) => {
                capture.invalidate();
                Err(CuResult::ERROR_STREAM_CAPTURE_IMPLICIT)
            }
            None => Ok(()),
        }
    }

    /// A call that may wait for the whole device, such as an allocation.
    pub fn refuse_unsafe(&self) -> Result<(), CuResult> {
        let streams = lock(&self.streams);
        if streams.is_empty() || THREAD_MODE.get() == Mode::Relaxed {
            return Ok(());
        }
        let own = std::thread::current().id();
        let forbids = |capture: &&Arc<Capture>| match capture.mode {
            Mode::Global => THREAD_MODE.get() == Mode::Global || capture.thread == own,
            Mode::ThreadLocal => capture.thread == own,
            Mode::Relaxed => false,
        };
        match streams.values().find(forbids) {
            Some(capture) => {
                capture.invalidate();
                Err(CuResult::ERROR_STREAM_CAPTURE_UNSUPPORTED)
            }
            None => Ok(()),
        }
    }
}

impl Mark {
    /// Whether the event has an outcome that can be asked for: not while it stands in a graph.
    pub fn refuse(mark: &Mutex<Option<Mark>>) -> Result<(), CuResult> {
        match &*lock(mark) {
            Some(mark) => {
                mark.capture.invalidate();
                Err(CuResult::ERROR_CAPTURED_EVENT)
            }
            None => Ok(()),
        }
    }
}

impl Driver {
    /// Gives `stream` something to do: now, or each time that the graph is launched which the stream
    /// is capturing.
    pub fn submit(
        &self,
        context: &Context,
        stream: Handle,
        work: impl Fn(&Driver, &Context) -> Result<(), CuResult> + Send + Sync + 'static,
    ) -> Result<(), CuResult> {
        self.check_stream(stream)?;
        match self.captures.of(stream) {
            Some(capture) => capture.add(stream, Arc::new(work)),
            None => {
                self.captures.refuse_legacy(stream)?;
                work(self, context)
            }
        }
    }
}
