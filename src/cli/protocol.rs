//! The messages of a control socket: one JSON object a line, a request first, then answers.

use std::num::NonZeroU64;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sterna::convergence::{DirtySample, Limits};
use sterna::progress::{Event, Report};
use sterna::sampling::Sampled;
use sterna::source::Verify;
use sterna::source::{LimitsHandle, Options};

use super::exit::Exit;
use super::lanes::LaneArgs;
use super::limits::LimitArgs;
use super::security::SecurityArgs;

/// A request to the holder of a guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub(crate) enum Request {
    /// The guest's status.
    Status,
    /// The same, answered at once also by a process to which a guest is on its way.
    List,
    /// Move the guest. Answered by events, then by a report or a failure.
    Migrate(Box<Move>),
    /// Watch a running migration. Answered like the request that began it.
    Watch,
    /// Change the limits of a running migration.
    SetLimits(LimitArgs),
    /// Sample the guest's writes for at most this long.
    DirtyRate { longest_ms: u64 },
    /// End a running migration.
    Cancel,
    /// Report what became of the guest, and settle what can be settled; with the operator's word that the
    /// other host is fenced, also resume or run the guest.
    Recover { resume_source: bool, run_destination: bool },
    /// Let the guest check its own memory.
    Check,
    /// Destroy the guest and end.
    Stop,
}

/// The parameters of a migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Move {
    pub(crate) to: String,
    pub(crate) lanes: LaneArgs,
    #[serde(default)]
    pub(crate) security: SecurityArgs,
    pub(crate) limits: LimitArgs,
    pub(crate) state_max_bytes: Option<u64>,
    pub(crate) verify: Verify,
}

/// An answer of the holder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub(crate) enum Answer {
    /// To `status` and `list`.
    Status(Status),
    /// To `list`, while a guest is on its way: `arriving`, or once it is paused at both ends `ready` or
    /// `kept`.
    Arriving { phase: String },
    /// During `migrate` and `watch`.
    Progress(Box<Event>),
    /// The end of a migration that succeeded.
    Moved(Box<Report>),
    /// To `dirty-rate`.
    Sampled(Samples),
    /// To `check`.
    Checked(Checked),
    /// To `set-limits`: the limits in force.
    Limits(Limits),
    /// To `recover`.
    Found(Found),
    /// To `cancel` and `stop`.
    Done,
    /// The request failed.
    Failed(Failure),
}

/// A guest's status.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) name: String,
    #[serde(flatten)]
    pub(crate) vitals: Vitals,
    pub(crate) migrating: bool,
    /// The guest was given away, and its fate is unknown.
    pub(crate) in_doubt: bool,
    /// The guest is migrating without TLS.
    #[serde(default)]
    pub(crate) insecure: bool,
}

/// What a VMM reports on its guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Vitals {
    pub(crate) kind: GuestKind,
    pub(crate) phase: String,
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: u32,
    pub(crate) heartbeats: u64,
    /// How often a heartbeat's count did not follow the one before.
    pub(crate) heartbeat_regressions: u64,
    /// Passes over the working set.
    pub(crate) passes: u64,
    pub(crate) throttle_percent: u8,
    /// The pages that each vCPU may write anew in a second, if that is limited.
    #[serde(default)]
    pub(crate) write_limit_pages_per_second: Option<NonZeroU64>,
}

/// The kind of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum GuestKind {
    /// The test VMM's, on KVM.
    Kvm,
    /// The test VMM's, on threads.
    Synthetic,
    /// Stock QEMU's.
    Qemu,
}

/// Samples of a guest's writes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Samples {
    pub(crate) ram_bytes: u64,
    pub(crate) touched_bytes: u64,
    pub(crate) harvest_ms: f64,
    pub(crate) heartbeats_per_second: Option<f64>,
    pub(crate) heartbeats_per_second_watched: Option<f64>,
    pub(crate) samples: Vec<Sample>,
    /// How it was measured, if not by Sterna.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) note: Option<String>,
}

/// The guest's writes in one interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) ms: f64,
    pub(crate) dirty_bytes: u64,
    pub(crate) mbps: f64,
}

/// The result of a guest's check of its own memory.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Checked {
    pub(crate) pages: u64,
    pub(crate) wrong: u64,
}

/// The fate of a guest: as an exit code, and in words that follow its name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Found {
    pub(crate) exit: Exit,
    pub(crate) what: String,
}

/// Why a request failed, and where the guest is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    pub(crate) what: String,
    /// Where the guest is, as a clause.
    pub(crate) guest: String,
    /// The code of the library's error, if it was one.
    pub(crate) code: Option<String>,
}

impl Move {
    pub(crate) fn options(&self) -> Result<Options, String> {
        let mut limits = Limits::default();
        self.limits.apply_to(&mut limits);
        self.lanes.check(&self.security)?;
        Ok(Options {
            transports: self.lanes.transports(&self.security),
            lanes: self.lanes.lanes,
            security: self.security.security()?,
            limits: LimitsHandle::new(limits),
            state_max_bytes: self.state_max_bytes,
            verify: self.verify,
            ..Options::default()
        })
    }
}

impl From<Sampled> for Samples {
    fn from(sampled: Sampled) -> Self {
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        let sample = |sample: &DirtySample| {
            #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
            let mbps = sample.dirty_bytes as f64 / 1e3 / ms(sample.interval).max(1e-3);
            Sample { ms: ms(sample.interval), dirty_bytes: sample.dirty_bytes, mbps }
        };
        Self {
            ram_bytes: sampled.ram_bytes,
            touched_bytes: sampled.touched_bytes,
            harvest_ms: ms(sampled.harvest),
            heartbeats_per_second: sampled.heartbeats_per_second,
            heartbeats_per_second_watched: sampled.heartbeats_per_second_watched,
            samples: sampled.samples.iter().map(sample).collect(),
            note: None,
        }
    }
}

impl Samples {
    pub(crate) fn to_sampled(&self) -> Sampled {
        let time = |ms: f64| Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default();
        let sample =
            |sample: &Sample| DirtySample { interval: time(sample.ms), dirty_bytes: sample.dirty_bytes };
        Sampled {
            ram_bytes: self.ram_bytes,
            touched_bytes: self.touched_bytes,
            samples: self.samples.iter().map(sample).collect(),
            harvest: time(self.harvest_ms),
            heartbeats_per_second: self.heartbeats_per_second,
            heartbeats_per_second_watched: self.heartbeats_per_second_watched,
        }
    }
}
#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REQUESTS: [&str; 7] = [
        r#"{"do":"status"}"#,
        r#"{"do":"list"}"#,
        r#"{"do":"migrate","to":"host-b:7837","lanes":{"transport":"auto","lanes":4,"pin_limit":null,
            "rdma_write":1048576,"rdma_list":128,"rdma_signal":256,"rdma_window":16777216},"limits":{
            "downtime_limit":300,"downtime_max":1500,"bandwidth_limit":0,"max_rounds":100,"timeout":0,
            "throttle_max":99,"if_stuck":"throttle,abort"},"state_max_bytes":null,"verify":"off","security":{
            "trust_dir":"/etc/sterna","insecure":false,"encrypt":"required"}}"#,
        r#"{"do":"set-limits","downtime_limit":300,"max_rounds":null,"timeout":5}"#,
        r#"{"do":"dirty-rate","longest_ms":2000}"#,
        r#"{"do":"recover","resume_source":true,"run_destination":false}"#,
        r#"{"do":"stop"}"#,
    ];

    /// Does with a request what its holder does before it has an effect, and says whether it is one.
    fn take(line: &str) -> bool {
        let Ok(request) = serde_json::from_str::<Request>(line) else { return false };
        let again = serde_json::to_string(&request).expect("a request that was read can be sent");
        assert_eq!(serde_json::from_str::<Request>(&again).expect("and is read again"), request);
        match request {
            Request::Migrate(to_move) => drop(to_move.options()),
            Request::SetLimits(limits) => limits.apply_to(&mut Limits::default()),
            _ => {}
        }
        true
    }

    #[test]
    fn each_request_is_read() {
        REQUESTS.iter().for_each(|line| assert!(take(line), "{line}"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn no_line_on_the_control_socket_makes_it_panic(
            request in 0..REQUESTS.len(),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            number: u64,
        ) {
            let mut line = REQUESTS[request].replace("300", &number.to_string()).into_bytes();
            for (at, byte) in damage {
                let at = at.index(line.len());
                line[at] = byte;
            }
            take(&String::from_utf8_lossy(&line));
        }
    }
}
