//! The adapter from `sterna-qemu` to the engine: stock QEMU guests.

mod guest;
mod host;
mod log;
mod ram;

pub(crate) use guest::{Fate, QemuGuest};
pub(crate) use host::QemuHost;
