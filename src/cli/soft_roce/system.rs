//! Carries out decisions, and reads what `preflight` does not.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::net::IpAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use crate::cli::preflight::{RdmaDevice, program, rdma_devices};
use serde::Deserialize;
use thiserror::Error;

use super::plan::{Facts, Holder, Step};

/// How long a command may take. Removing a device blocks in the kernel as long as a program uses the device.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a new device may take to get its address, which the kernel assigns in the background.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Why a step failed.
#[derive(Debug, Error)]
pub(super) enum StepError {
    #[error("the program `{program}` is missing")]
    NoProgram { program: String },
    #[error("`{command}` could not be run: {source}")]
    NotRun { command: String, source: io::Error },
    #[error("`{command}` failed: {stderr}")]
    Failed { command: String, stderr: String },
    #[error("`{command}` did not end within {} s: the kernel waits until nothing uses the device", COMMAND_TIMEOUT.as_secs())]
    TimedOut { command: String },
}

/// Runs a step's command.
pub(super) fn execute(step: &Step) -> Result<(), StepError> {
    let words = step.command();
    let (name, arguments) = words.split_first().expect("every step names a program");
    let path = program(name).ok_or_else(|| StepError::NoProgram { program: (*name).to_owned() })?;
    let command = words.join(" ");
    let not_run = |source| StepError::NotRun { command: command.clone(), source };
    let mut child = Command::new(path)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(not_run)?;
    let deadline = Instant::now() + COMMAND_TIMEOUT;
    loop {
        match child.try_wait().map_err(not_run)? {
            Some(status) if status.success() => return Ok(()),
            Some(_) => return Err(StepError::Failed { stderr: read_stderr(&mut child), command }),
            None if Instant::now() < deadline => thread::sleep(POLL_INTERVAL),
            None => {
                // Without waiting: inside the kernel the process may not receive the signal until the device
                // is free.
                let _ = child.kill();
                return Err(StepError::TimedOut { command });
            }
        }
    }
}

fn read_stderr(child: &mut Child) -> String {
    let mut text = String::new();
    if let Some(stderr) = &mut child.stderr {
        // Unreadable output is left out of the error; the failure itself is reported.
        let _ = stderr.take(4096).read_to_string(&mut text);
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Why an existing device is not usable yet.
#[derive(Debug, Error)]
pub(super) enum NotReady {
    #[error("{name} has gone away again")]
    Gone { name: String },
    #[error("{name} is there, but its port is {state}: {netdev} has no link")]
    PortDown { name: String, netdev: String, state: String },
    #[error("{name} is there, but has no RoCE v2 address: {netdev} has no IP address")]
    NoGid { name: String, netdev: String },
}

impl NotReady {
    pub(super) fn remedy(&self, facts: &Facts) -> Option<String> {
        let platform = &facts.readings.platform;
        match self {
            Self::Gone { .. } => None,
            Self::PortDown { netdev, .. } => Some(format!(
                "{}, and check what it is plugged into",
                platform.as_root(&format!("ip link set dev {netdev} up"))
            )),
            Self::NoGid { netdev, .. } => {
                Some(platform.as_root(&format!("ip address add ADDRESS/PREFIX dev {netdev}")))
            }
        }
    }
}

/// Waits until the port of the device is active and has a RoCE v2 address.
pub(super) fn wait_until_ready(name: &str) -> Result<RdmaDevice, NotReady> {
    let deadline = Instant::now() + READY_TIMEOUT;
    loop {
        let device = rdma_devices().into_iter().find(|device| device.name == name);
        match readiness(device, name) {
            Err(_) if Instant::now() < deadline => thread::sleep(POLL_INTERVAL),
            ended => return ended,
        }
    }
}

fn readiness(device: Option<RdmaDevice>, name: &str) -> Result<RdmaDevice, NotReady> {
    let name = name.to_owned();
    let Some(device) = device else { return Err(NotReady::Gone { name }) };
    let netdev = device.soft_roce_on.clone().unwrap_or_default();
    match device.ports.first() {
        Some(port) if port.active() && port.roce_gid().is_some() => Ok(device),
        Some(port) if port.active() => Err(NotReady::NoGid { name, netdev }),
        Some(port) => Err(NotReady::PortDown { name, netdev, state: port.state.clone() }),
        None => Err(NotReady::Gone { name }),
    }
}

/// The IP addresses of each interface, from the command `ip`; `None` if it is missing or too old to answer in
/// JSON.
pub(super) fn addresses() -> Option<BTreeMap<String, Vec<IpAddr>>> {
    #[derive(Deserialize)]
    struct Interface {
        ifname: String,
        #[serde(default)]
        addr_info: Vec<Address>,
    }
    #[derive(Deserialize)]
    struct Address {
        local: Option<IpAddr>,
    }
    let output =
        Command::new(program("ip")?).args(["-json", "address", "show"]).stdin(Stdio::null()).output().ok()?;
    let interfaces: Vec<Interface> = serde_json::from_slice(&output.stdout).ok()?;
    let addresses = interfaces.into_iter().map(|interface| {
        (interface.ifname, interface.addr_info.into_iter().filter_map(|address| address.local).collect())
    });
    Some(addresses.collect())
}

/// The processes that have `/dev/infiniband/{verbs_file}` open, as far as this process may see.
pub(super) fn holders(verbs_file: &str) -> Vec<Holder> {
    let file = Path::new("/dev/infiniband").join(verbs_file);
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    processes
        .flatten()
        .filter_map(|process| {
            let pid = process.file_name().to_str()?.parse().ok()?;
            let open = fs::read_dir(process.path().join("fd")).ok()?;
            let holds = open
                .flatten()
                .any(|descriptor| fs::read_link(descriptor.path()).is_ok_and(|target| target == file));
            let program =
                || fs::read_to_string(process.path().join("comm")).unwrap_or_default().trim().to_owned();
            holds.then(|| Holder { pid, program: program() })
        })
        .collect()
}
