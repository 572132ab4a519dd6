//! `sterna run`, `receive` and `migrate`, as an operator uses them.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::peers::cpu::CpuTime;
use crate::peers::failure::Failure;
use crate::peers::migration::Migration;
use crate::peers::process::{Running, quote};
use crate::peers::setup::Setup;

/// Moves an idle guest, all of its RAM touched, and has both ends compare it. The comparison's CPU
/// time counts, its duration does not.
pub(crate) fn migrate(setup: &Setup, transport: &str) -> Result<Migration, Failure> {
    let ends = Ends::of_sternas_guest(setup, &format!("--memory={}", setup.ram_bytes), None)?;
    let cpu = || -> Result<_, Failure> {
        let own = CpuTime::of_process(ends.source.id())?.and(CpuTime::of_process(ends.destination.id())?);
        Ok((CpuTime::of_machine()?, own))
    };
    let (machine_before, own_before) = cpu()?;
    let began = Instant::now();
    let report = ends.migrate(setup, setup.downtime_ms, &["--transport", transport, "--verify=full"])?;
    let wall = began.elapsed();
    let machine_cpu = CpuTime::of_machine()?.since(machine_before);
    let own_after = ends.cpu_after()?;
    let number = |name: &str| {
        report[name]
            .as_f64()
            .ok_or_else(|| Failure::Words { what: "sterna migrate".into(), said: report.to_string() })
    };
    let pages = setup.ram_bytes / 4096;
    if report["verified_pages"].as_u64() != Some(pages) || report["wrong_pages"].as_u64() != Some(0) {
        return Err(Failure::Sterna(format!("not all of {pages} pages were found equal: {report}")));
    }
    let compare_ms = number("verify_ms")?;
    Ok(Migration {
        total_ms: number("total_ms")? - compare_ms,
        wall_ms: wall.as_secs_f64() * 1e3 - compare_ms,
        setup_ms: Some(number("setup_ms")?),
        downtime_ms: number("downtime_ms")? - compare_ms,
        moved_mb: number("bytes_sent")? / 1e6,
        machine_cpu,
        own_cpu: own_after.since(own_before),
        destination_cpu: None,
        guest_mbps: None,
        throttle_percent: 0,
    })
}

/// The time from the call to the first write of a page, for a guest of this much RAM, mostly untouched.
pub(crate) fn first_byte_ms(setup: &Setup, ram_bytes: u64) -> Result<f64, Failure> {
    let ends = Ends::of_sternas_guest(setup, &format!("--memory={ram_bytes}"), Some("--working-set=64M"))?;
    // The part after the first byte does not matter, and freeing a large guest's memory takes its time.
    let report = ends.migrate(setup, 10_000, &["--transport", "rdma"])?;
    report["first_byte_ms"].as_f64().ok_or(Failure::NotReported)
}

/// The processes that hold the guest, one after the other.
pub(crate) struct Ends {
    pub(crate) source: Running,
    pub(crate) destination: Running,
    address: String,
    /// The CPU time of children that had ended before.
    ended_before: CpuTime,
    runtime: TempDir,
}

const NAME: &str = "bench-here";

impl Ends {
    fn of_sternas_guest(setup: &Setup, memory: &str, working_set: Option<&str>) -> Result<Self, Failure> {
        let mut arguments = vec!["run", "--machine=synthetic", "--dirty-rate=0", memory];
        arguments.extend(working_set);
        Self::start(setup, (&arguments, "running"), &["receive"])
    }

    /// Starts both processes with these commands; `event` tells that the source's is ready.
    pub(crate) fn start(
        setup: &Setup,
        (source, event): (&[&str], &str),
        destination: &[&str],
    ) -> Result<Self, Failure> {
        let runtime = setup.folder("run")?;
        std::fs::set_permissions(runtime.path(), PermissionsExt::from_mode(0o700))
            .map_err(Failure::system("close a folder to others"))?;
        let start = |arguments: &[&str], event: &str| -> Result<(Running, Value), Failure> {
            let mut command = Command::new(&setup.sterna);
            command.env("STERNA_RUNTIME_DIR", runtime.path()).args(arguments);
            command.env("STERNA_STATE_DIR", runtime.path().join("state"));
            command.env("STERNA_STATE_DIR_ANYWAY", "1");
            command.args(["--json", "--until-stdin-closes"]);
            let mut running = Running::start(&mut command, "sterna", "(cargo build --release)")?;
            let line =
                running.until("start", setup.start_max, |running| Ok(find_event(&running.said(), event)))?;
            Ok((running, line))
        };
        let listen = format!("--listen={}", setup.address());
        // A device's address is no loopback, and both ends are on this machine.
        let receive = ["--once", "--port=0", "--name=bench-there", listen.as_str(), "--insecure"];
        let (destination, listening) = start(&[destination, &receive].concat(), "listening")?;
        let address = listening["address"].as_str().unwrap_or_default().to_owned();
        let (source, _ready) = start(&[source, &[NAME]].concat(), event)?;
        Ok(Self { source, destination, address, ended_before: CpuTime::of_ended_children()?, runtime })
    }

    /// Moves the guest; returns the report.
    pub(crate) fn migrate(
        &self,
        setup: &Setup,
        downtime_ms: u32,
        arguments: &[&str],
    ) -> Result<Value, Failure> {
        let mut command = Command::new(&setup.sterna);
        command.env("STERNA_RUNTIME_DIR", self.runtime.path());
        command.args(["migrate", NAME, "--json", "--insecure", "--to", &self.address]);
        let downtime = downtime_ms.to_string();
        command.args(["--downtime-limit", &downtime, "--downtime-max", &downtime]).args(arguments);
        let running = Running::start(&mut command, "sterna", "(cargo build --release)")?;
        let said = running.succeed(setup.patience + MIGRATE_MAX)?;
        said.lines()
            .rev()
            .find_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|report| report["status"] == "completed")
            .ok_or_else(|| Failure::Words { what: "sterna migrate".into(), said: quote(&said) })
    }

    /// The CPU time of both ends and of the command that drove them. The source ends by itself.
    pub(crate) fn cpu_after(mut self) -> Result<CpuTime, Failure> {
        self.source.end(Duration::from_secs(20))?;
        let ended = CpuTime::of_ended_children()?.since(self.ended_before);
        Ok(ended.and(CpuTime::of_process(self.destination.id())?))
    }
}

/// Added to the time for convergence: the comparison.
const MIGRATE_MAX: Duration = Duration::from_secs(60);

/// The first line that is this event.
fn find_event(said: &str, name: &str) -> Option<Value> {
    said.lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find(|event| event["event"] == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_found_among_other_lines() {
        let said = "note: no KVM\n{\"event\":\"other\"}\n{\"event\":\"running\",\"name\":\"x\"}\n";
        assert_eq!(find_event(said, "running").unwrap()["name"], "x");
        assert_eq!(find_event("running", "running"), None);
        assert_eq!(find_event("{\"event\":", "running"), None);
    }
}
