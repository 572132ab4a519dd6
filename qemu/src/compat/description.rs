//! The description of a guest in a QEMU, which the source sends to the destination.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::block::Block;
use super::cpu::{Cpu, PROPERTIES_MAX};
use super::devices::{DEVICES_MAX, Device};
use super::places;
use crate::monitor::{Accelerator, Monitor, Version};
use crate::qmp::QmpError;

/// The longest encoded description, in bytes. One of QEMU 10 has about 3,000.
pub const DESCRIPTION_MAX: usize = 256 << 10;

/// The first byte of an encoded description.
const FORMAT: u8 = 2;

/// The most RAM blocks.
const BLOCKS_MAX: usize = 4096;

/// What the destination has to have too.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Description {
    /// The version of QEMU. It may differ.
    pub version: Version,
    /// The type of the machine with its version.
    pub machine_type: String,
    /// What executes the guest's instructions.
    pub accelerator: Accelerator,
    /// How many processors the guest has.
    pub vcpus: u32,
    /// What the guest sees of its first processor.
    pub cpu: Cpu,
    /// All RAM blocks, shared or not.
    pub blocks: Vec<Block>,
    /// The devices on its PCI buses, and those behind them. `None` if QEMU has no such list.
    pub devices: Option<Vec<Device>>,
    /// The guest's UUID, if it has one.
    pub uuid: Option<String>,
    /// The vCPUs did not run, so they are not to run at the destination either.
    pub was_paused: bool,
}

/// Why a description is no use.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DescriptionError {
    /// It does not fit.
    #[error("the description of QEMU has {0} bytes, more than {DESCRIPTION_MAX}")]
    TooLong(usize),
    /// It has too many parts.
    #[error("the description of QEMU has {0} {1}, more than {2}")]
    TooMany(usize, &'static str, usize),
    /// It is of another version of Sterna.
    #[error(
        "the description of QEMU has a format that this version of Sterna does not know; install one version on \
         both hosts"
    )]
    Format,
    /// More follows.
    #[error("the description of QEMU is followed by {0} bytes")]
    Rest(usize),
    /// It is none.
    #[error("the description of QEMU is not understood: {0}")]
    Encoding(#[from] postcard::Error),
}

impl Description {
    /// Asks QEMU.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn of(monitor: &Monitor) -> Result<Self, QmpError> {
        let vcpus = monitor.vcpus()?;
        let Some(first) = vcpus.first() else {
            return Err(QmpError::words("query-cpus-fast", "the guest has no processor"));
        };
        Ok(Self {
            version: monitor.version()?,
            machine_type: monitor.machine_type()?,
            accelerator: monitor.accelerator()?,
            vcpus: u32::try_from(vcpus.len()).unwrap_or(u32::MAX),
            cpu: Cpu::new(monitor.cpu_model(first)?),
            blocks: monitor.ram_blocks()?.into_iter().map(Block::new).collect(),
            devices: places::find(monitor)?,
            uuid: monitor.uuid()?,
            was_paused: !monitor.status()?.running,
        })
    }

    /// Asks QEMU for its devices again: some may have been plugged in or unplugged.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn look_at_devices(&mut self, monitor: &Monitor) -> Result<(), QmpError> {
        self.devices = places::find(monitor)?;
        Ok(())
    }

    /// The description as bytes.
    ///
    /// # Errors
    ///
    /// It is too long for [`DESCRIPTION_MAX`].
    pub fn encode(&self) -> Result<Vec<u8>, DescriptionError> {
        let bytes = postcard::to_extend(self, vec![FORMAT])?;
        if bytes.len() > DESCRIPTION_MAX {
            return Err(DescriptionError::TooLong(bytes.len()));
        }
        Ok(bytes)
    }

    /// The description from the bytes of a peer.
    ///
    /// # Errors
    ///
    /// Bytes that are no description, or one that is out of bounds.
    pub fn decode(bytes: &[u8]) -> Result<Self, DescriptionError> {
        if bytes.len() > DESCRIPTION_MAX {
            return Err(DescriptionError::TooLong(bytes.len()));
        }
        let [FORMAT, body @ ..] = bytes else { return Err(DescriptionError::Format) };
        let (this, rest): (Self, _) = postcard::take_from_bytes(body)?;
        if !rest.is_empty() {
            return Err(DescriptionError::Rest(rest.len()));
        }
        let devices = this.devices.as_ref().map_or(0, Vec::len);
        let counts = [
            (devices, "devices", DEVICES_MAX),
            (this.blocks.len(), "RAM blocks", BLOCKS_MAX),
            (this.cpu.properties.len(), "properties of its CPU", PROPERTIES_MAX),
        ];
        match counts.into_iter().find(|(count, _, max)| count > max) {
            Some((count, what, max)) => Err(DescriptionError::TooMany(count, what, max)),
            None => Ok(this),
        }
    }
}
