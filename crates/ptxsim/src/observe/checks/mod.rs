//! The checks, one to a file.

mod proxy;

pub(crate) use proxy::ProxyCheck;
