//! The operator's command that starts a QEMU for each guest that comes.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use sterna_qemu::monitor::{Accelerator, Monitor, RunState};
use sterna_qemu::qmp::{Client, QmpError};
use thiserror::Error;

use super::command::{Ended, run};
use super::pipe::shown;

/// Starts a QEMU for each guest that comes.
#[derive(Debug)]
pub(crate) struct StartCommand {
    /// Run by the shell.
    command: String,
    limit: Duration,
}

/// A guest that comes, as far as the command learns about it.
#[derive(Clone, Copy, Debug)]
pub(super) struct ComingGuest<'proposal> {
    /// Its name on this host.
    pub(super) name: &'proposal str,
    pub(super) memory_bytes: u64,
    pub(super) machine_type: &'proposal str,
    pub(super) vcpus: u32,
    pub(super) accelerator: Accelerator,
    pub(super) from: SocketAddr,
}

/// Why no QEMU waits for the guest.
#[derive(Debug, Error)]
pub(super) enum StartError {
    #[error("the machine type {0} is not a name that QEMU has for one")]
    MachineType(String),
    #[error("the command that starts QEMU at the destination cannot be run: {0}")]
    Run(#[from] io::Error),
    #[error("the command that starts QEMU at the destination did not end in {} s, and was killed{}",
        limit.as_secs(), because(complaint))]
    Late { limit: Duration, complaint: String },
    #[error("the command that starts QEMU at the destination failed ({status}){}", because(complaint))]
    Failed { status: String, complaint: String },
    #[error(
        "the command that starts QEMU at the destination printed {printed}, and one line with the path of \
        its QMP socket is expected"
    )]
    NoPath { printed: String },
    #[error("no QEMU answers at the socket that the command at the destination printed: {0}")]
    NoQemu(#[from] QmpError),
}

impl StartCommand {
    pub(crate) fn new(command: impl Into<String>) -> Self {
        Self { command: command.into(), limit: LIMIT }
    }

    /// Runs the command, and connects to the QEMU that it started.
    pub(super) fn start(&self, guest: &ComingGuest<'_>) -> Result<StartedQemu, StartError> {
        let deadline = Instant::now() + self.limit;
        let path = self.path(guest)?;
        loop {
            match Client::connect(&path) {
                Ok(client) => return Ok(StartedQemu { monitor: Monitor::new(client), is_needed: false }),
                // QEMU in the background has perhaps not made its socket yet.
                Err(QmpError::Connect { .. }) if Instant::now() < deadline => thread::sleep(LOOKS_EVERY),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The socket that the command prints.
    fn path(&self, guest: &ComingGuest<'_>) -> Result<PathBuf, StartError> {
        let mut command = Command::new("sh");
        // A peer chose most of the values: no shell reads them as a part of the command.
        command.arg("-c").arg(&self.command).envs(environment(guest)?);
        let Ended { status, stdout, complaint } = run(&mut command, self.limit)?;
        let Some(status) = status else { return Err(StartError::Late { limit: self.limit, complaint }) };
        if !status.success() {
            return Err(StartError::Failed { status: status.to_string(), complaint });
        }
        match stdout.trim_end_matches('\n') {
            "" => Err(StartError::NoPath { printed: "nothing".into() }),
            path if path.contains('\n') => {
                let lines = path.lines().count();
                Err(StartError::NoPath { printed: format!("{lines} lines") })
            }
            path if path.len() > PATH_MAX || path.contains('\0') => {
                Err(StartError::NoPath { printed: shown(path) })
            }
            path => Ok(path.into()),
        }
    }
}

/// A QEMU that was started for a guest. Dropping this value ends that QEMU, unless it is needed, and if it
/// still waits for a guest.
#[derive(Debug)]
pub(super) struct StartedQemu {
    monitor: Monitor,
    is_needed: bool,
}

impl StartedQemu {
    pub(super) fn monitor(&self) -> &Monitor {
        &self.monitor
    }

    /// A guest is about to come into it.
    pub(super) fn keep(mut self) {
        self.is_needed = true;
    }
}

impl Drop for StartedQemu {
    fn drop(&mut self) {
        // The command may have printed the socket of another QEMU, one with a guest.
        let waits = || self.monitor.status().is_ok_and(|status| status.state == RunState::InMigrate);
        if !self.is_needed && waits() {
            end(&self.monitor);
        }
    }
}

/// Ends a QEMU that was started for a guest that does not come, and waits for its end: the command may be run
/// again at once.
pub(super) fn end(monitor: &Monitor) {
    if let Err(error) = monitor.quit() {
        tracing::warn!("the QEMU that was started for a guest is not needed, and does not end: {error}");
        return;
    }
    let deadline = Instant::now() + ENDS_WITHIN;
    while Client::connect(monitor.client().path()).is_ok() && Instant::now() < deadline {
        thread::sleep(LOOKS_EVERY);
    }
}

/// What the command learns about the guest.
fn environment(guest: &ComingGuest<'_>) -> Result<[(&'static str, String); 6], StartError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.+".contains(&byte);
    let machine_type = guest.machine_type;
    // A leading dash would be an option.
    if !(1..=MACHINE_TYPE_MAX).contains(&machine_type.len())
        || !machine_type.bytes().all(plain)
        || machine_type.starts_with('-')
    {
        return Err(StartError::MachineType(shown(machine_type).chars().take(MACHINE_TYPE_MAX).collect()));
    }
    Ok([
        ("STERNA_GUEST_NAME", guest.name.to_owned()),
        ("STERNA_GUEST_MEMORY_BYTES", guest.memory_bytes.to_string()),
        ("STERNA_GUEST_MACHINE", machine_type.to_owned()),
        ("STERNA_GUEST_VCPUS", guest.vcpus.to_string()),
        ("STERNA_GUEST_ACCELERATOR", guest.accelerator.to_string().to_lowercase()),
        ("STERNA_GUEST_FROM", guest.from.ip().to_canonical().to_string()),
    ])
}

fn because(complaint: &str) -> String {
    if complaint.is_empty() { String::new() } else { format!(": {complaint}") }
}

/// How long the command may take, and after that QEMU to open its socket.
const LIMIT: Duration = Duration::from_secs(30);

const LOOKS_EVERY: Duration = Duration::from_millis(20);

/// How long QEMU may take to end.
const ENDS_WITHIN: Duration = Duration::from_secs(5);

/// The longest path of a socket, in bytes.
const PATH_MAX: usize = 107;

/// The longest name of a machine type, in bytes.
const MACHINE_TYPE_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn path(script: &str, guest: &ComingGuest<'_>) -> Result<PathBuf, StartError> {
        StartCommand { command: script.into(), limit: Duration::from_secs(120) }.path(guest)
    }

    fn guest() -> ComingGuest<'static> {
        ComingGuest {
            name: "tern",
            memory_bytes: 64 << 20,
            machine_type: "pc-q35-10.0",
            vcpus: 2,
            accelerator: Accelerator::Kvm,
            from: "[::ffff:10.0.0.1]:7837".parse().unwrap(),
        }
    }

    #[test]
    fn the_command_learns_about_the_guest_from_its_environment() {
        let script = r#"echo "$STERNA_GUEST_NAME,$STERNA_GUEST_MEMORY_BYTES,$STERNA_GUEST_MACHINE" \
            "$STERNA_GUEST_VCPUS,$STERNA_GUEST_ACCELERATOR,$STERNA_GUEST_FROM""#;
        let said = path(script, &guest()).unwrap();
        assert_eq!(said, PathBuf::from("tern,67108864,pc-q35-10.0 2,kvm,10.0.0.1"));
    }

    #[test]
    fn a_machine_type_that_could_be_something_else_never_reaches_the_command() {
        let long = "q".repeat(MACHINE_TYPE_MAX + 1);
        for machine_type in
            ["", "-incoming", "q35,kernel=/etc/passwd", "q35 -S", "q35;reboot", "q35\n", &long]
        {
            let refused = path("exit 0", &ComingGuest { machine_type, ..guest() });
            assert!(matches!(refused, Err(StartError::MachineType(_))), "{machine_type} {refused:?}");
        }
    }

    #[test]
    fn a_command_that_fails_or_prints_no_path_is_told_with_its_words() {
        let cases = [
            ("echo no room >&2; exit 7", "failed (exit status: 7): no room"),
            ("kill -TERM $$", "failed (signal: 15 (SIGTERM))"),
            ("exit 0", "printed nothing, and one line"),
            ("echo /run/a; echo /run/b", "printed 2 lines, and one line"),
        ];
        for (script, text) in cases {
            let error = path(script, &guest()).unwrap_err().to_string();
            assert!(error.contains(text), "{script}: {error}");
        }
        let late =
            StartCommand { command: "echo slow >&2; sleep 600".into(), limit: Duration::from_millis(500) };
        let error = late.path(&guest()).unwrap_err().to_string();
        assert!(error.contains("did not end in") && error.contains(": slow"), "{error}");
    }

    #[test]
    fn a_path_at_which_no_qemu_listens_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let command = format!("echo {}/qmp", folder.path().display());
        let start = StartCommand { command, limit: Duration::from_millis(100) };
        let error = start.start(&guest()).unwrap_err();
        assert!(matches!(error, StartError::NoQemu(QmpError::Connect { .. })), "{error}");
    }
}
