//! Which QEMU, and which guest.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Monitor;
use crate::qmp::QmpError;

/// A version of QEMU.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[non_exhaustive]
pub struct Version {
    /// The 10 in 10.0.2.
    pub major: u32,
    /// The 0 in 10.0.2.
    pub minor: u32,
    /// The 2 in 10.0.2.
    pub micro: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

#[derive(Deserialize)]
struct VersionAnswer {
    qemu: Version,
}

#[derive(Deserialize)]
struct Name {
    name: Option<String>,
}

#[derive(Deserialize)]
struct Uuid {
    #[serde(rename = "UUID")]
    uuid: String,
}

/// The answer of `query-uuid` if the guest has none.
const NO_UUID: &str = "00000000-0000-0000-0000-000000000000";

impl Monitor {
    /// The version of QEMU.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn version(&self) -> Result<Version, QmpError> {
        self.ask("query-version", &json!({})).map(|answer: VersionAnswer| answer.qemu)
    }

    /// The guest's name, from `-name`.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn name(&self) -> Result<Option<String>, QmpError> {
        self.ask("query-name", &json!({})).map(|answer: Name| answer.name)
    }

    /// The guest's UUID, from `-uuid`.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn uuid(&self) -> Result<Option<String>, QmpError> {
        let Uuid { uuid } = self.ask("query-uuid", &json!({}))?;
        Ok(Some(uuid).filter(|uuid| uuid != NO_UUID))
    }

    /// The type of the machine with its version, such as `pc-q35-10.0`.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn machine_type(&self) -> Result<String, QmpError> {
        let class: String = self.qom_get("/machine", "type")?;
        Ok(class.strip_suffix("-machine").unwrap_or(&class).to_owned())
    }
}
