//! A QEMU that a command started, not the test.

use std::fs;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use serde_json::json;
use tempfile::TempDir;

use super::monitor::Monitor;
use super::serial::Serial;
use super::setup::Setup;

/// The place of a QEMU that Sterna starts by a command. Dropping this value ends that QEMU.
#[derive(Debug)]
pub(crate) struct Started {
    folder: TempDir,
    /// Connected when it is first used: QEMU serves one client a socket.
    monitor: OnceLock<Monitor>,
}

impl Started {
    pub(crate) fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("sterna-qemu-").tempdir().expect("a temporary folder");
        Self { folder, monitor: OnceLock::new() }
    }

    /// A shell command that starts such a machine, which waits for a guest, and prints the path of its
    /// monitor.
    pub(crate) fn command(&self, setup: &Setup<'_>) -> String {
        let (folder, qemu) = (self.folder.path().display(), setup.shell_command(&self.folder));
        format!(
            "env | grep ^STERNA_GUEST_ | sort >{folder}/environment; \
             {qemu} -incoming defer -S >/dev/null 2>{folder}/stderr & \
             echo $! >{folder}/process; echo {folder}/qmp"
        )
    }

    /// The variables for the command, a line each; empty if it was not run.
    pub(crate) fn environment(&self) -> String {
        fs::read_to_string(self.folder.path().join("environment")).unwrap_or_default()
    }

    /// Whether QEMU lives.
    pub(crate) fn lives(&self) -> bool {
        UnixStream::connect(self.folder.path().join("test.qmp")).is_ok()
    }

    /// Whether QEMU runs the guest.
    pub(crate) fn runs(&self) -> bool {
        self.monitor().execute("query-status", json!({}))["status"] == "running"
    }

    fn monitor(&self) -> &Monitor {
        self.monitor.get_or_init(|| {
            let monitor = Monitor::new(self.folder.path().join("test.qmp"));
            assert!(monitor.connect(), "QEMU has ended");
            monitor
        })
    }

    /// What the guest says while it is in this QEMU.
    pub(crate) fn serial(&self) -> Serial {
        let process = fs::read_to_string(self.folder.path().join("process")).expect("it was started");
        Serial::new(self.folder.path().join("serial.log"), process.trim().parse().expect("a number"))
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if self.lives() {
            self.monitor().quit();
        }
    }
}
