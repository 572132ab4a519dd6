//! QEMU's commands, with types.

mod accelerator;
mod capabilities;
mod devices;
mod dirty_limit;
mod dirty_rate;
mod machine;
mod memory;
mod migration;
mod parameters;
mod pci;
mod processor;
mod restore;
mod status;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

pub use self::accelerator::Accelerator;
pub use self::capabilities::Capabilities;
pub use self::devices::Child;
pub use self::dirty_limit::DirtyLimit;
pub use self::dirty_rate::{DirtyRate, DirtyRateMode, shortest_interval};
pub use self::machine::Version;
pub use self::memory::{MemoryBackend, MemorySize, RamBlock};
pub use self::migration::{MigrationReport, MigrationStatus, RamReport};
pub use self::parameters::{Parameter, Parameters};
pub use self::processor::{CpuModel, Vcpu};
pub use self::restore::Restore;
pub use self::status::{RunState, Status};
use crate::qmp::{Client, QmpError};

/// The monitor of one QEMU.
#[derive(Clone, Debug)]
pub struct Monitor {
    client: Client,
}

impl Monitor {
    /// The monitor behind a client.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    /// The client: for events, conditions and other commands.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Executes a command of the human monitor; returns its text.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`]. A command that does not exist is a text, not an error.
    pub fn human(&self, line: &str) -> Result<String, QmpError> {
        self.ask("human-monitor-command", &json!({ "command-line": line }))
    }

    /// Reads a property of an object.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`]: QEMU refuses if there is no such object or property.
    pub fn qom_get<T: DeserializeOwned>(&self, path: &str, property: &str) -> Result<T, QmpError> {
        self.ask("qom-get", &json!({ "path": path, "property": property }))
    }

    /// The same for a property that not all versions of QEMU, or not all kinds of objects, have.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`], without a refusal.
    pub fn qom_find<T: DeserializeOwned>(&self, path: &str, property: &str) -> Result<Option<T>, QmpError> {
        match self.qom_get(path, property) {
            Err(QmpError::Refused { .. }) => Ok(None),
            other => other.map(Some),
        }
    }

    fn ask<T: DeserializeOwned>(&self, command: &str, arguments: &Value) -> Result<T, QmpError> {
        let answer = self.client.execute(command, arguments)?;
        serde_json::from_value(answer).map_err(|error| QmpError::words(command, error.to_string()))
    }

    /// A command whose answer says nothing.
    fn tell(&self, command: &str, arguments: &Value) -> Result<(), QmpError> {
        self.client.execute(command, arguments).map(drop)
    }
}
