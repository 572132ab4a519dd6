//! A limit of what each vCPU writes, which QEMU keeps with KVM's dirty rings.

use serde::Deserialize;
use serde_json::json;

use super::Monitor;
use crate::qmp::QmpError;

/// A vCPU whose writes are limited.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct DirtyLimit {
    /// The vCPU's number.
    pub cpu_index: u64,
    /// The limit, in MiB a second.
    pub limit_rate: u64,
    /// What it wrote in the latest second.
    pub current_rate: u64,
}

impl Monitor {
    /// Whether KVM records writes in rings.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn has_rings(&self) -> Result<bool, QmpError> {
        let entries: Option<u64> = self.qom_find("/machine/accel", "dirty-ring-size")?;
        Ok(entries.is_some_and(|entries| entries > 0))
    }

    /// Limits each vCPU to so many MiB of pages a second.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within): QEMU refuses without rings.
    pub fn set_dirty_limit(&self, mib_per_second: u64) -> Result<(), QmpError> {
        self.tell("set-vcpu-dirty-limit", &json!({ "dirty-rate": mib_per_second }))
    }

    /// Ends the limit of all vCPUs; also if there is none.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn cancel_dirty_limit(&self) -> Result<(), QmpError> {
        self.tell("cancel-vcpu-dirty-limit", &json!({}))
    }

    /// The vCPUs that are limited.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn dirty_limits(&self) -> Result<Vec<DirtyLimit>, QmpError> {
        self.ask("query-vcpu-dirty-limit", &json!({}))
    }
}
