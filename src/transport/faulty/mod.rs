//! A transport with faults, for tests: real TCP lanes that pass for another transport's. On request they do
//! to a write what a device, a network or a defect would do.
//!
//! A [`FaultyProvider`] is in the list of either end like any other transport, so the production code handles
//! its faults, including the choice of the next transport in the list.
//!
//! A fault is *armed* and then *strikes*, once: a test arms it at the right moment, and asserts in the end
//! that it struck.

mod faults;
mod lanes;
mod provider;
mod receiver;
mod registration;

pub(crate) use faults::{FenceFault, LaneFaults, ReceiverFaults, WriteFault, completed_with};
pub(crate) use provider::FaultyProvider;
