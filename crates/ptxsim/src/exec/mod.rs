//! Running a kernel.
