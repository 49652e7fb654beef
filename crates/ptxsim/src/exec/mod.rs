//! Running a kernel.
//!
//! [`launch`] hands out blocks to threads, [`block`] runs the warps of one, [`warp`] keeps the
//! diverged lanes of a warp, [`step`] executes an instruction. Memory is in [`access`], what
//! lanes do together in [`collective`], asynchronous copies in [`copies`].

mod access;
mod block;
mod bulk;
mod cluster;
mod collective;
mod copies;
mod launch;
mod mbarrier;
mod print;
pub(crate) mod registers;
mod step;
mod warp;
mod wgmma;

pub(crate) use cluster::owner;
pub(crate) use launch::{Launch, run};
pub(crate) use registers::lanes;
