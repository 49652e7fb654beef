//! Files in memory.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use crate::error::{Error, Result};

/// A file that is mapped read-only as long as any of its bytes is held.
#[derive(Clone)]
pub(crate) struct MappedFile(Arc<memmap2::Mmap>);

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl MappedFile {
    pub(crate) fn open(path: &Path) -> Result<MappedFile> {
        let failed = |source| Error::io(path, source);
        let file = File::open(path).map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(Error::file(path, "is not a file"));
        }
        // SAFETY: the map is read-only and private to this process. As with every memory-mapped file, another
        // process that truncates it meanwhile makes reads fail with a signal; our own writers never touch an
        // existing file, they rename a new one over it (`atomic_file`), which leaves the map intact.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(failed)?;
        Ok(MappedFile(Arc::new(map)))
    }

    /// All of it.
    pub(crate) fn bytes(&self) -> Bytes {
        Bytes::from_owner(self.clone())
    }

    /// Gives the memory of `part`, which is one of its own, back to the system: what is read of it later comes from
    /// the file again.
    #[cfg(unix)]
    pub(crate) fn release(&self, part: &[u8]) {
        let start = part.as_ptr().addr().checked_sub(self.0.as_ptr().addr());
        let Some(start) = start.filter(|start| start + part.len() <= self.0.len()) else {
            return;
        };
        let advice = memmap2::UncheckedAdvice::DontNeed;
        // SAFETY: the range lies in a map of a file that is never written through it, so its pages hold what the file
        // holds, and come back as they were. Where the system refuses, nothing has happened.
        let _ = unsafe { self.0.unchecked_advise_range(advice, start, part.len()) };
    }

    /// Only the systems that take such advice can do something.
    #[cfg(not(unix))]
    pub(crate) fn release(&self, _: &[u8]) {}
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::MappedFile;

    /// Bytes of this process's memory that come from files.
    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssFile:"));
        let kib = line.unwrap().split_whitespace().next().unwrap();
        kib.parse::<usize>().unwrap() << 10
    }

    #[test]
    fn what_is_released_takes_no_memory_and_reads_as_before() {
        const LEN: usize = 64 << 20;
        let file = tempfile::NamedTempFile::new().unwrap();
        let contents: Vec<u8> = (0..LEN).map(|i| (i * 7 % 251) as u8).collect();
        std::fs::write(file.path(), &contents).unwrap();
        let map = MappedFile::open(file.path()).unwrap();
        let bytes = map.bytes();
        assert!(bytes == contents);
        let before = resident();
        map.release(&bytes[1000..LEN - 1000]);
        assert!(before - resident() > LEN / 2);
        assert!(bytes == contents);
        // Bytes of another owner are left alone.
        map.release(&contents);
        assert!(bytes == contents);
    }
}
