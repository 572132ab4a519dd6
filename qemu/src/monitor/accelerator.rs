//! What executes the guest's instructions.

use serde::{Deserialize, Serialize};
use serde_json::json;
use strum::Display;

use super::Monitor;
use super::machine::Version;
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

impl Accelerator {
    /// Whether a migration may miss pages that the guest writes, by a defect of this version of QEMU: TCG
    /// before 9.0 loses track of changed pages.
    #[must_use]
    pub fn misses_writes(self, version: Version) -> bool {
        self == Self::Tcg && version.major < 9
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tcg_before_qemu_9_misses_writes() {
        let version = |major, minor| Version { major, minor, micro: 5 };
        let misses = |accelerator: Accelerator| {
            [(7, 2), (8, 2), (9, 0), (10, 0)]
                .map(|(major, minor)| accelerator.misses_writes(version(major, minor)))
        };
        assert_eq!(misses(Accelerator::Tcg), [true, true, false, false]);
        assert_eq!(misses(Accelerator::Kvm), [false; 4]);
    }
}
