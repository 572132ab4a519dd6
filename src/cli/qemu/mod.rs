//! The adapter from `sterna-qemu` to the engine: stock QEMU guests.

mod command;
mod guest;
mod host;
mod log;
mod machine;
mod pipe;
mod process;
mod ram;
mod sampling;
mod start;

pub(crate) use guest::{Fate, QemuGuest};
pub(crate) use host::{QemuHost, WaitingQemu};
pub(crate) use start::StartCommand;
