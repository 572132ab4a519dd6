//! Checks of this machine: what it has for running and moving guests, what it lacks, and the command that
//! fixes each lack.
//!
//! Reading and judging are separate: [`Readings::take`] reads `/proc`, `/sys`, `/dev` and the verbs library
//! and never fails. [`judge`] turns the readings into [`Check`]s, and [`Transports`] uses only them, so that
//! both can be tested on machines that do not exist.

mod check;
mod judgement;
mod readings;
#[cfg(test)]
mod tests;
mod transports;

pub(crate) use check::{Check, Outcome};
pub(crate) use judgement::judge;
pub(crate) use readings::{
    Firewall, KvmCapabilities, ModuleState, Netdev, NetworkReadings, RdmaDevice, RdmaPort, Readings, program,
    rdma_devices,
};
#[cfg(test)]
pub(crate) use readings::{Packages, Platform, RdmaReadings, VerbsLibrary};
pub(crate) use transports::Transports;
