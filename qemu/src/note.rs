//! A note that this process leaves with QEMU, for the process that follows if this one dies.
//!
//! QEMU outlives the process that moves its guest, and ends with the guest. So the note is kept in QEMU, as
//! the data of an object of type `secret`, which the guest does not see.

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::monitor::{Monitor, Restore};
use crate::qmp::QmpError;

/// What a migration owes to the guest and to the operator.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub(crate) struct Note {
    /// The guest's name, by which a host's records know it.
    pub(crate) guest: String,
    /// The guest is to run on the host that owns it after the migration.
    pub(crate) shall_run: bool,
    /// The operator's settings.
    pub(crate) restore: Restore,
    /// Sterna limits the vCPUs' writes, which the operator does not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) limits_writes: bool,
}

impl Note {
    /// The note in QEMU, if a migration of Sterna left one.
    ///
    /// # Errors
    /// [`QmpError`], also if the object is no note.
    pub(crate) fn find(monitor: &Monitor) -> Result<Option<Self>, QmpError> {
        let Some(text) = monitor.qom_find::<String>(PATH, "data")? else { return Ok(None) };
        let note = serde_json::from_str(&text);
        note.map(Some).map_err(|error| QmpError::words("qom-get", format!("{PATH} is no note: {error}")))
    }

    /// Leaves the note with QEMU, in place of an earlier one.
    ///
    /// # Errors
    /// [`QmpError`]; no note may be there.
    pub(crate) fn leave(&self, monitor: &Monitor) -> Result<(), QmpError> {
        match self.add(monitor) {
            // There is an earlier one.
            Err(QmpError::Refused { .. }) => {
                Self::remove(monitor)?;
                self.add(monitor)
            }
            other => other,
        }
    }

    fn add(&self, monitor: &Monitor) -> Result<(), QmpError> {
        let arguments = json!({ "qom-type": "secret", "id": NAME, "data": self.data("object-add")? });
        monitor.client().execute("object-add", &arguments).map(drop)
    }

    /// Whether a migration of Sterna left a note in QEMU.
    ///
    /// # Errors
    /// [`QmpError`] without an answer.
    pub(crate) fn is_left(monitor: &Monitor) -> Result<bool, QmpError> {
        Ok(monitor.qom_find::<String>(PATH, "data")?.is_some())
    }

    /// Removes the note, if there is one.
    ///
    /// # Errors
    /// [`QmpError`] without an answer.
    pub(crate) fn remove(monitor: &Monitor) -> Result<(), QmpError> {
        match monitor.client().execute("object-del", &json!({ "id": NAME })) {
            // There is none.
            Ok(_) | Err(QmpError::Refused { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Puts the operator's settings back, and removes the note. A failure is only logged: the guest does not
    /// depend on either.
    pub(crate) fn fulfil(mut self, monitor: &Monitor) {
        self.put_settings_back(monitor);
        if let Err(error) = Self::remove(monitor) {
            tracing::warn!("QEMU keeps the note of a migration that is over: {error}");
        }
    }

    /// Puts the operator's settings back. The note stays with QEMU, and says that the guest is this host's.
    pub(crate) fn keep_without_settings(mut self, monitor: &Monitor) {
        self.put_settings_back(monitor);
        if let Err(error) = self.change(monitor) {
            tracing::warn!("QEMU keeps the settings of before with its note: {error}");
        }
    }

    /// Changes the note that is left, which is never missing meanwhile.
    fn change(&self, monitor: &Monitor) -> Result<(), QmpError> {
        let arguments = json!({ "path": PATH, "property": "data", "value": self.data("qom-set")? });
        monitor.client().execute("qom-set", &arguments).map(drop)
    }

    fn data(&self, command: &str) -> Result<String, QmpError> {
        serde_json::to_string(self).map_err(|error| QmpError::words(command, error.to_string()))
    }

    fn put_settings_back(&mut self, monitor: &Monitor) {
        if std::mem::take(&mut self.limits_writes)
            && let Err(error) = monitor.cancel_dirty_limit()
        {
            tracing::warn!("the guest's writes may stay limited: {error}");
        }
        if let Err(error) = self.restore.put_back(monitor) {
            tracing::warn!("the settings of QEMU's migration are not those of before: {error}");
        }
    }
}

/// QEMU's name for the object.
const NAME: &str = "sterna-note";
const PATH: &str = "/objects/sterna-note";
