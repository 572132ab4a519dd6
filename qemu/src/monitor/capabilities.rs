//! The capabilities of migration: which QEMU has, and which are on.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

use super::Monitor;
use crate::qmp::QmpError;

/// Each capability that QEMU has, and whether it is on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities(BTreeMap<String, bool>);

impl Capabilities {
    /// Whether the capability is on; `None` if QEMU does not have it.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<bool> {
        self.0.get(name).copied()
    }

    /// Whether QEMU has the capability, and it is on.
    #[must_use]
    pub fn is_on(&self, name: &str) -> bool {
        self.get(name) == Some(true)
    }
}

#[derive(Deserialize)]
struct Entry {
    capability: String,
    state: bool,
}

impl Monitor {
    /// The capabilities.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn capabilities(&self) -> Result<Capabilities, QmpError> {
        let entries: Vec<Entry> = self.ask("query-migrate-capabilities", &json!({}))?;
        Ok(Capabilities(entries.into_iter().map(|entry| (entry.capability, entry.state)).collect()))
    }

    /// Switches capabilities on or off, all or none. [`Restore`](super::Restore) does the same in a way that
    /// can be taken back.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within): QEMU refuses unknown ones,
    /// and all during a migration.
    pub fn set_capabilities<'a>(
        &self,
        changes: impl IntoIterator<Item = (&'a str, bool)>,
    ) -> Result<(), QmpError> {
        let entry = |(name, on)| json!({ "capability": name, "state": on });
        let entries: Vec<Value> = changes.into_iter().map(entry).collect();
        self.tell("migrate-set-capabilities", &json!({ "capabilities": entries }))
    }
}
