//! Guests of QEMU that Sterna holds and moves.

use std::fmt::Display;

use serde_json::Value;

use super::super::{Host, Process, Receiving, in_a_lab};
use super::running::Qemu;
use super::setup::Setup;

/// A guest of QEMU that a process of Sterna holds.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) host: Host,
    pub(crate) process: Process,
    pub(crate) qemu: Qemu,
}

/// A QEMU that waits for a guest, and the process of Sterna that takes the guest in.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) host: Host,
    pub(crate) receiving: Receiving,
    pub(crate) qemu: Qemu,
}

/// The transport of these moves: by RDMA where a lab provides a device.
fn transport() -> &'static str {
    if in_a_lab() { "rdma" } else { "tcp" }
}

/// The name of all these guests.
pub(crate) const NAME: &str = "tern";

impl Held {
    /// Adopts the guest of a QEMU.
    pub(crate) fn adopt(qemu: Qemu, more: &[&str]) -> Self {
        Self::adopt_at(Host::new(), qemu, more)
    }

    /// The same by a process that forgets one named page in a thousand.
    pub(crate) fn adopt_forgetful(qemu: Qemu) -> Self {
        Self::adopt_at(Host::under(&["env", "STERNA_TEST_FORGETS_PAGES=1"]), qemu, &[])
    }

    /// The same on this host.
    pub(crate) fn adopt_at(host: Host, qemu: Qemu, more: &[&str]) -> Self {
        let socket = format!("--qmp={}", qemu.qmp().display());
        let process = host.start(["adopt", NAME, "--json", socket.as_str()].iter().chain(more));
        process.event("adopted");
        Self { host, process, qemu }
    }

    /// `sterna migrate`, just started.
    pub(crate) fn migrate(&self, to: impl Display, more: &[&str]) -> Process {
        self.host.migrate(NAME, to, more)
    }

    /// Moves the guest to a new QEMU with this command line, with all of its memory compared. Returns the
    /// guest at its new host, and the report.
    #[track_caller]
    pub(crate) fn move_to(self, setup: &Setup<'_>, more: &[&str]) -> (Self, Value) {
        let waiting = Waiting::start(setup);
        let lanes = format!("--transport={}", transport());
        let how = [&["--verify=full", lanes.as_str()], more].concat();
        let migrating = self.migrate(waiting.receiving.address, &how);
        let report = migrating.wait().expect_code(0).json();
        assert_eq!((&report["status"], &report["wrong_pages"]), (&"completed".into(), &0.into()), "{report}");
        assert!(report["verified_pages"].as_u64() > Some(0), "{report}");
        assert_eq!(report["transport"], transport());
        (waiting.arrived_from(self), report)
    }
}

impl Waiting {
    pub(crate) fn start(setup: &Setup<'_>) -> Self {
        Self::start_at(Host::new(), setup)
    }

    /// The same on this host.
    pub(crate) fn start_at(host: Host, setup: &Setup<'_>) -> Self {
        let qemu = setup.start_incoming();
        let socket = format!("--qmp={}", qemu.qmp().display());
        // In a lab, the address of the soft-RoCE device.
        let listen = in_a_lab().then_some("--listen=10.77.0.1");
        let receiving = host.receive(&[&[socket.as_str()], listen.as_slice()].concat());
        Self { host, receiving, qemu }
    }

    /// Asserts that the guest runs in this QEMU, and that the other one has ended.
    #[track_caller]
    pub(crate) fn arrived_from(self, source: Held) -> Held {
        let Self { host, receiving, qemu } = self;
        assert_eq!(receiving.process.event("arrived")["name"], NAME);
        assert!(qemu.runs(), "{}", qemu.status());
        source.process.wait().expect_code(0);
        let mut old = source.qemu;
        super::super::wait_until("the QEMU at the source ends", || old.has_ended());
        Held { host, process: receiving.process, qemu }
    }
}
