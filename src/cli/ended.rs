//! How the holding of a guest ended.

use super::output::outln;

/// Why a process does not hold its guest any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The guest runs at this destination.
    Moved(String),
    /// A request or a signal stopped the guest.
    Stopped,
    /// A request or a signal ended the process; the guest goes on in its QEMU.
    Released,
    /// Its VMM ended by itself, and the guest with it.
    WithVmm,
}

impl Ended {
    /// Prints it.
    pub(crate) fn say(&self, name: &str, json: bool) {
        let (event, text) = match self {
            Self::Moved(to) if json => {
                outln!("{}", serde_json::json!({ "event": "moved", "name": name, "to": to }));
                return;
            }
            Self::Moved(to) => ("moved", format!("{name} has moved to {to} and runs here no more")),
            Self::Stopped => ("stopped", format!("{name} was stopped")),
            Self::WithVmm => ("vmm-ended", format!("{name} has ended with its QEMU")),
            Self::Released => {
                ("released", format!("{name} goes on in its QEMU, and Sterna holds it no more"))
            }
        };
        if json {
            outln!("{}", serde_json::json!({ "event": event, "name": name }));
        } else {
            outln!("{text}");
        }
    }
}
