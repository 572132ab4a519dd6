use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde::Deserialize;
use sterna::progress::{DowntimeReport, RoundReport};

use super::BenchError;

/// Runs `sterna demo`: two processes, and a guest that moves from one to the other.
#[derive(Debug)]
pub(super) struct Demo {
    pub(super) program: PathBuf,
    /// What all migrations have in common.
    pub(super) common: Vec<String>,
}

/// What the figures need of a migration's report.
#[derive(Debug, Deserialize)]
pub(super) struct Migration {
    pub(super) total_ms: f64,
    pub(super) downtime_ms: f64,
    pub(super) downtime_predicted: DowntimeReport,
    pub(super) downtime_measured: DowntimeReport,
    pub(super) bytes_sent: u64,
    pub(super) heartbeats_per_second: Option<f64>,
    pub(super) per_round: Vec<RoundReport>,
}

impl Demo {
    /// A migration; `None` if it gave up because it did not converge.
    pub(super) fn migrate(&self, how: &[String]) -> Result<Option<Migration>, BenchError> {
        let arguments: Vec<_> =
            ["demo".to_owned(), "--json".into()].iter().chain(&self.common).chain(how).cloned().collect();
        let output = Command::new(&self.program)
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
    pub(super) fn throughput_mbps(&self) -> f64 {
        let ms: f64 = self.per_round.iter().map(|round| round.ms).sum();
        self.bytes_sent as f64 / 1e3 / ms
    }

    /// The rounds while the guest ran.
    pub(super) fn running(&self) -> &[RoundReport] {
        self.per_round.split_last().map_or(&[], |(_, running)| running)
    }

    /// How fast the guest wrote new pages over all rounds in which it ran, in MB/s.
    pub(super) fn dirty_rate_mbps(&self) -> f64 {
        let (bytes, ms) = self.running().iter().fold((0.0, 0.0), |(bytes, ms), round| {
            let time = round.ms + round.harvest_ms;
            (bytes + round.dirty_rate_mbps * time, ms + time)
        });
        bytes / ms
    }
}
