//! The parameters of migration.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use strum::Display;

use super::Monitor;
use crate::qmp::QmpError;

/// A parameter that is a number.
#[derive(Clone, Copy, Debug, Deserialize, Display, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[strum(serialize_all = "kebab-case")]
#[non_exhaustive]
pub enum Parameter {
    /// The longest pause that QEMU switches for, in ms. QEMU refuses more than 2,000,000.
    DowntimeLimit,
    /// The highest speed in the rounds, in bytes/s; 0 is none.
    MaxBandwidth,
    /// How many channels `multifd` has.
    MultifdChannels,
    /// By how much `auto-converge` slows the guest down at first, in percent.
    CpuThrottleInitial,
    /// By how much more each time.
    CpuThrottleIncrement,
    /// By how much at most.
    MaxCpuThrottle,
    /// From which share of the bytes sent, in percent, the bytes that the guest wrote meanwhile are too many
    /// for `auto-converge`.
    ThrottleTriggerThreshold,
}

/// All parameters.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parameters(Map<String, Value>);

impl Parameters {
    /// A parameter that is a number; `None` if QEMU does not have it.
    #[must_use]
    pub fn number(&self, parameter: Parameter) -> Option<u64> {
        self.0.get(&parameter.to_string())?.as_u64()
    }

    /// A parameter that is a text; `None` if QEMU does not have it or it is empty.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.as_str().filter(|text| !text.is_empty())
    }
}

impl Monitor {
    /// The parameters.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn parameters(&self) -> Result<Parameters, QmpError> {
        self.ask("query-migrate-parameters", &json!({})).map(Parameters)
    }

    /// Sets parameters, also during a migration. [`Restore`](super::Restore) does the same in a way that can
    /// be taken back.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn set_parameters(
        &self,
        changes: impl IntoIterator<Item = (Parameter, u64)>,
    ) -> Result<(), QmpError> {
        let changes: Map<String, Value> =
            changes.into_iter().map(|(parameter, value)| (parameter.to_string(), value.into())).collect();
        self.tell("migrate-set-parameters", &Value::Object(changes))
    }
}
