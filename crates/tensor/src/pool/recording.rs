//! Which memory a captured pass uses, and whether the pass may be repeated.

use super::{Buffer, Held, Loan, Pool, Purpose, Source};
use crate::Result;
use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

/// The memory of the work that is being captured.
#[derive(Default)]
pub(super) struct Recording {
    number: u64,
    /// Blocks that were lent since it began, by address.
    lent: HashMap<usize, Weak<AtomicBool>>,
    /// Buffers from before that were used, by address.
    used: HashMap<usize, Weak<Loan>>,
    /// What was lent and is not back, and the most that it was.
    held: Held,
    most_held: Held,
}

impl Recording {
    /// Notes what is lent; returns the recording's number.
    pub fn lend(&mut self, lent: Option<&Arc<AtomicBool>>, purpose: Purpose, bytes: usize) -> u64 {
        if let Some(lent) = lent {
            let address = Arc::as_ptr(lent).addr();
            self.lent.insert(address, Arc::downgrade(lent));
        }
        self.held.add(purpose, bytes);
        if self.held.total() > self.most_held.total() {
            self.most_held = self.held;
        }
        self.number
    }

    /// Notes what comes back that recording `number` has lent.
    pub fn give_back(&mut self, number: u64, purpose: Purpose, bytes: usize) {
        if number == self.number {
            self.held.subtract(purpose, bytes);
        }
    }
}

/// The memory that captured work uses whenever it is repeated.
pub(crate) struct Recorded {
    lent: Vec<Weak<AtomicBool>>,
    used: Vec<Weak<Loan>>,
    held: Held,
    most_held: Held,
}

impl Recorded {
    /// Whether everything that was lent in the capture came back before its end.
    pub fn is_closed(&self) -> bool {
        self.held.total() == 0
    }

    /// Whether the work may be repeated now: the buffers that it found are still the same, and no block that it was
    /// lent is freed, or lent to others.
    fn is_ready(&self) -> bool {
        let is_free =
            |lent: &Weak<AtomicBool>| lent.upgrade().is_some_and(|lent| !lent.load(Relaxed));
        let is_alive = |loan: &Weak<Loan>| loan.strong_count() > 0;
        self.lent.iter().all(is_free) && self.used.iter().all(is_alive)
    }
}

impl<S: Source> Pool<S> {
    /// From now on notes what is lent and used, and neither asks the source for memory nor gives any back to it. Returns
    /// whether it does: not where it does already.
    pub fn start_recording(&self) -> bool {
        let mut state = self.lock();
        if state.recording.is_some() {
            return false;
        }
        state.recordings += 1;
        state.recording = Some(Recording {
            number: state.recordings,
            ..Recording::default()
        });
        self.is_recording.store(true, Relaxed);
        true
    }

    /// What was noted since [`Pool::start_recording`].
    pub fn stop_recording(&self) -> Recorded {
        self.is_recording.store(false, Relaxed);
        let recording = self.lock().recording.take().unwrap_or_default();
        Recorded {
            lent: recording.lent.into_values().collect(),
            used: recording.used.into_values().collect(),
            held: recording.held,
            most_held: recording.most_held,
        }
    }

    /// Runs `repeat`, which starts the captured work again, where that is possible; returns whether it is. What the work
    /// holds for a while is counted.
    pub fn repeat(&self, recorded: &Recorded, repeat: impl FnOnce() -> Result<()>) -> Result<bool> {
        // Locked, so that nothing is lent between the look and the start.
        let mut state = self.lock();
        if state.recording.is_some() || !recorded.is_ready() {
            return Ok(false);
        }
        let mut held = state.memory.held;
        for purpose in Purpose::ALL {
            held.0[purpose as usize] += recorded.most_held.of(purpose);
        }
        state.memory.note_peak(held);
        repeat()?;
        Ok(true)
    }
}

impl<S: Source> Buffer<S> {
    /// Notes that the work that is being captured, if any, uses it.
    pub fn note_use(&self) {
        if !self.pool.is_recording.load(Relaxed) {
            return;
        }
        if let Some(recording) = &mut self.pool.lock().recording
            && self.loan.recorded_in != Some(recording.number)
        {
            let address = Arc::as_ptr(&self.loan).addr();
            recording.used.insert(address, Arc::downgrade(&self.loan));
        }
    }
}
