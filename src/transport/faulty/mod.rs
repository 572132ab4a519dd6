//! A transport with faults, for tests: real TCP lanes that pass for another transport's, and do to the writes that they are given
//! what a device, a network or a defect would do.
//!
//! A [`FaultyProvider`] stands in the list of either end like any other transport, so that the code that handles its faults is the
//! code that handles them in production, also the choice of the next in the list.
//!
//! A fault is *armed* and then *strikes*, once: a test arms it when the moment has come, and asks in the end whether it struck.

mod faults;
mod lanes;
mod provider;
mod receiver;
mod registration;

pub(crate) use faults::{FenceFault, LaneFaults, ReceiverFaults, WriteFault, completed_with};
pub(crate) use provider::FaultyProvider;
