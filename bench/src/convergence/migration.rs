//! A migration by `sterna demo`, and its report.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;
use sterna::progress::{DowntimeReport, RoundReport};

use super::error::BenchError;

/// Runs `sterna demo`: two processes, and a guest that moves from one to the other.
#[derive(Debug)]
pub(crate) struct Demo {
    pub(crate) program: PathBuf,
    /// The options that all migrations share.
    pub(crate) common: Vec<String>,
    /// The folder for its sockets and journals, if not the default.
    pub(crate) temporary: Option<PathBuf>,
}

impl Demo {
    /// The program of this name, else the `sterna` beside this one.
    pub(crate) fn program(named: Option<&Path>) -> PathBuf {
        let beside = || std::env::current_exe().map(|here| here.with_file_name("sterna")).unwrap_or_default();
        named.map_or_else(beside, Path::to_owned)
    }
}

/// The parts of a migration's report that the figures need.
#[derive(Debug, Deserialize)]
pub(crate) struct Migration {
    pub(crate) total_ms: f64,
    pub(crate) downtime_ms: f64,
    pub(crate) guest_downtime_ms: Option<f64>,
    pub(crate) downtime_predicted: DowntimeReport,
    pub(crate) downtime_measured: DowntimeReport,
    pub(crate) bytes_sent: u64,
    pub(crate) heartbeats_per_second: Option<f64>,
    pub(crate) per_round: Vec<RoundReport>,
}

impl Demo {
    /// A migration; `None` if it gave up because it did not converge.
    pub(crate) fn migrate(&self, how: &[String]) -> Result<Option<Migration>, BenchError> {
        let arguments: Vec<_> =
            // The figures are those of plain lanes.
            ["demo".to_owned(), "--json".into(), "--insecure".into()].iter().chain(&self.common).chain(how).cloned().collect();
        let mut command = Command::new(&self.program);
        if let Some(folder) = &self.temporary {
            command.env("TMPDIR", folder);
        }
        let output = command
            .args(&arguments)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| BenchError::Start { program: self.program.display().to_string(), error })?;
        let said = String::from_utf8_lossy(&output.stderr);
        if said.contains("error: given up after") {
            return Ok(None);
        }
        if !output.status.success() {
            return Err(BenchError::Failed {
                arguments: arguments.join(" "),
                status: output.status,
                said: said.lines().rev().take(3).collect::<Vec<_>>().join("; "),
            });
        }
        let out = String::from_utf8_lossy(&output.stdout);
        Ok(Some(serde_json::from_str(out.lines().last().unwrap_or_default())?))
    }
}

impl Migration {
    /// Pages of the rounds over their time, in MB/s.
    pub(crate) fn throughput_mbps(&self) -> f64 {
        let ms: f64 = self.per_round.iter().map(|round| round.ms).sum();
        self.bytes_sent as f64 / 1e3 / ms
    }

    /// The rounds during which the guest ran.
    pub(crate) fn running(&self) -> &[RoundReport] {
        self.per_round.split_last().map_or(&[], |(_, running)| running)
    }

    /// The guest's rate of new dirty pages over all rounds in which it ran, in MB/s.
    pub(crate) fn dirty_rate_mbps(&self) -> f64 {
        let (bytes, ms) = self.running().iter().fold((0.0, 0.0), |(bytes, ms), round| {
            let time = round.ms + round.harvest_ms;
            (bytes + round.dirty_rate_mbps * time, ms + time)
        });
        bytes / ms
    }
}
