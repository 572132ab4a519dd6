//! The operator's settings, to be put back after a migration.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Monitor;
use super::capabilities::Capabilities;
use super::parameters::{Parameter, Parameters};
use crate::qmp::QmpError;

/// The operator's values of all settings that were changed through this value.
///
/// It can be stored, so that another process puts the settings back.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Restore {
    capabilities: BTreeMap<String, bool>,
    parameters: BTreeMap<Parameter, u64>,
}

impl Restore {
    /// Switches capabilities on or off, all or none; `present` are those of now.
    ///
    /// # Errors
    ///
    /// Those of [`Monitor::set_capabilities`].
    pub fn set_capabilities(
        &mut self,
        monitor: &Monitor,
        present: &Capabilities,
        changes: &[(&str, bool)],
    ) -> Result<(), QmpError> {
        let changes: Vec<_> =
            changes.iter().copied().filter(|&(name, on)| present.get(name) != Some(on)).collect();
        if changes.is_empty() {
            return Ok(());
        }
        // Noted first: if the answer is missing, QEMU may have changed them.
        for (name, on) in changes.iter().filter_map(|&(name, _)| Some((name, present.get(name)?))) {
            self.capabilities.entry(name.to_owned()).or_insert(on);
        }
        monitor.set_capabilities(changes)
    }

    /// Sets parameters; `present` are those of now.
    ///
    /// # Errors
    ///
    /// Those of [`Monitor::set_parameters`].
    pub fn set_parameters(
        &mut self,
        monitor: &Monitor,
        present: &Parameters,
        changes: &[(Parameter, u64)],
    ) -> Result<(), QmpError> {
        for (parameter, value) in changes.iter().filter_map(|&(name, _)| Some((name, present.number(name)?)))
        {
            self.parameters.entry(parameter).or_insert(value);
        }
        monitor.set_parameters(changes.iter().copied())
    }

    /// Puts the operator's values back. QEMU takes capabilities only once no migration is under way.
    ///
    /// # Errors
    ///
    /// Those of [`Monitor::set_capabilities`]; what was not put back is kept for the next call.
    pub fn put_back(&mut self, monitor: &Monitor) -> Result<(), QmpError> {
        if !self.parameters.is_empty() {
            monitor.set_parameters(self.parameters.iter().map(|(&parameter, &value)| (parameter, value)))?;
            self.parameters.clear();
        }
        if !self.capabilities.is_empty() {
            monitor.set_capabilities(self.capabilities.iter().map(|(name, &on)| (name.as_str(), on)))?;
            self.capabilities.clear();
        }
        Ok(())
    }

    /// Whether nothing is to be put back.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.capabilities.is_empty() && self.parameters.is_empty()
    }
}
