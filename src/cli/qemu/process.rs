//! The process of a QEMU: whether it lives.

use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use sterna_qemu::monitor::Monitor;
use sterna_qemu::qmp::QmpError;

/// The process of a QEMU. Its descriptor never stands for a later process with the same id.
#[derive(Debug)]
pub(super) struct QemuProcess(Option<OwnedFd>);

impl QemuProcess {
    /// The process behind a monitor.
    pub(super) fn of(monitor: &Monitor) -> Result<Self, QmpError> {
        let process = Pid::from_raw(monitor.client().peer()?.process);
        let descriptor = process.map(|process| pidfd_open(process, PidfdFlags::empty()));
        // Without it, the end of QEMU shows only in its monitor.
        Ok(Self(descriptor.and_then(|opened| {
            opened.inspect_err(|error| tracing::warn!("the end of QEMU will not be seen: {error}")).ok()
        })))
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ends_within_seconds(0)
    }

    /// Whether it ends in a moment: its sockets close before.
    pub(super) fn is_ending(&self) -> bool {
        self.ends_within_seconds(2)
    }

    fn ends_within_seconds(&self, tv_sec: i64) -> bool {
        let Some(descriptor) = &self.0 else { return false };
        let mut ended = [PollFd::new(descriptor, PollFlags::IN)];
        let limit = Timespec { tv_sec, tv_nsec: 0 };
        poll(&mut ended, Some(&limit)).is_ok_and(|count| count > 0)
    }
}
