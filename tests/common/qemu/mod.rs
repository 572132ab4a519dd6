//! Stock QEMU with guests that check themselves: their memory, disk, clocks and network.
//!
//! [`Setup`] is a command line; source and destination share one. It starts a [`Qemu`], which ends with the
//! test. [`Qemu::serial`] is what its guest reports. `ci/qemu` provides the programs, `ci/guest` the guests.

mod crossing;
mod disk;
mod memory;
mod monitor;
mod moves;
mod network;
mod programs;
mod running;
mod serial;
mod setup;
mod started;
mod wait;

pub(crate) use crossing::{At, Crossing, End, Fault, Strike, Victim};
pub(crate) use disk::Disk;
pub(crate) use memory::Memory;
pub(crate) use monitor::Monitor;
pub(crate) use moves::{Held, NAME, Waiting};
pub(crate) use network::{Network, Session};
pub(crate) use programs::{Program, is_demanded};
pub(crate) use running::Qemu;
pub(crate) use serial::{Serial, Tick};
pub(crate) use setup::{BootSector, Devices, LinuxGuest, Setup};
pub(crate) use started::Started;
pub(crate) use wait::wait_for;
