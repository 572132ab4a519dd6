//! The machine of a QEMU: asking for all of it takes a second, and only its devices change.

use sterna_qemu::compat::Description;
use sterna_qemu::monitor::{Accelerator, Child, Monitor};
use sterna_qemu::qmp::QmpError;

/// A machine that was asked for once.
#[derive(Clone, Debug)]
pub(super) struct QemuMachine {
    description: Description,
    /// What the operator had made then.
    made: Vec<Child>,
}

impl QemuMachine {
    pub(super) fn of(monitor: &Monitor) -> Result<Self, QmpError> {
        Ok(Self { made: monitor.devices()?, description: Description::of(monitor)? })
    }

    pub(super) fn accelerator(&self) -> Accelerator {
        self.description.accelerator
    }

    /// The machine as it is now: devices may have been plugged in or unplugged.
    pub(super) fn at_present(&mut self, monitor: &Monitor) -> Result<&Description, QmpError> {
        let made = monitor.devices()?;
        if made != self.made {
            self.description.look_at_devices(monitor)?;
            self.made = made;
        }
        Ok(&self.description)
    }
}
