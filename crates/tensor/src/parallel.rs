//! How row-wise operations are spread over the cores.

use rayon::iter::{
    IndexedParallelIterator,
    plumbing::{Producer, ProducerCallback},
};

/// Elements that a task handles at least: below this, handing it to another thread costs more than it saves.
const GRAIN: usize = 1 << 14;

/// Rows of `width` elements that make one task.
pub(crate) fn rows_per_task(width: usize) -> usize {
    (GRAIN / width.max(1)).max(1)
}

/// Runs `body` on every item. A single item stays on this thread: generation runs many operations on one
/// row, where waking a worker would take longer than the work.
pub(crate) fn for_each<I: IndexedParallelIterator>(items: I, body: impl Fn(I::Item) + Sync + Send) {
    if items.len() > 1 {
        items.for_each(body);
    } else {
        items.with_producer(Inline(body));
    }
}

struct Inline<F>(F);

impl<T, F: Fn(T)> ProducerCallback<T> for Inline<F> {
    type Output = ();

    fn callback<P: Producer<Item = T>>(self, producer: P) {
        producer.into_iter().for_each(self.0);
    }
}
