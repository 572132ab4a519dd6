//! What executes the guest's instructions.

use serde::{Deserialize, Serialize};
use serde_json::json;
use strum::Display;

use super::Monitor;
use crate::qmp::QmpError;

/// What executes the guest's instructions.
#[derive(Clone, Copy, Debug, Deserialize, Display, PartialEq, Eq, Serialize)]
pub enum Accelerator {
    /// The host's processor.
    #[strum(serialize = "KVM")]
    Kvm,
    /// QEMU itself, or an accelerator other than KVM.
    #[strum(serialize = "TCG")]
    Tcg,
}

#[derive(Deserialize)]
struct Kvm {
    enabled: bool,
}

impl Monitor {
    /// What executes the guest's instructions.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn accelerator(&self) -> Result<Accelerator, QmpError> {
        match self.ask("query-kvm", &json!({})) {
            Ok(Kvm { enabled: true }) => Ok(Accelerator::Kvm),
            Ok(Kvm { enabled: false }) => Ok(Accelerator::Tcg),
            Err(error) if error.is_no_such_command() => Ok(Accelerator::Tcg),
            Err(error) => Err(error),
        }
    }
}
