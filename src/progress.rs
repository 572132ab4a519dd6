//! The events of a migration while it runs, and its report at the end.

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::convergence::{Downtime, Limits};
use crate::verify::Verify;

/// Receives the events of a migration as they happen.
///
/// The migrating thread makes these calls, some while the guest is paused, so an implementation
/// returns at once: it does not write to a socket or a terminal, nor wait for a lock that another thread
/// holds while it does. Queue the event in bounded memory, let another thread pass it on, and drop events if
/// the reader does not keep up; [`Report`] has everything that matters in the end.
pub trait Observer: Sync {
    /// An event happened.
    fn event(&self, event: &Event);
}

/// Ignores all events.
impl Observer for () {
    fn event(&self, _event: &Event) {}
}

/// An event of a migration, at the source unless the destination is named.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Event {
    /// The destination is connected and has reserved the guest's RAM.
    Connected {
        /// The name of the transport by which the pages will travel, such as `rdma`.
        transport: String,
        /// The device or addresses, and why this transport.
        via: String,
        /// The guest's RAM in pages.
        total_pages: u64,
    },
    /// The lanes failed while the guest ran, and the migration starts again over those of another transport.
    FellBack {
        /// The name of the transport whose lanes failed.
        from: String,
        /// The name of the next transport in the list.
        to: String,
        /// The failure.
        why: String,
    },
    /// A round is over.
    Round {
        /// Its number, from 1.
        number: u32,
        /// Its measurements.
        #[serde(flatten)]
        round: RoundReport,
        /// The downtime if the guest were paused now; `None` if pages are left and the bandwidth is unknown
        /// because nothing was sent yet.
        predicted_downtime_ms: Option<f64>,
    },
    /// The rounds are not expected to come down to the downtime limit. Reported once, after the second round
    /// at the earliest.
    NotConverging {
        /// The reason.
        why: String,
        /// Changes that would help; each suffices.
        help: String,
        /// New pages that the guest wrote in the last round, in MB/s.
        dirty_rate_mbps: f64,
        /// The bandwidth of the link, in MB/s; `None` if nothing was sent yet to measure it.
        bandwidth_mbps: Option<f64>,
    },
    /// The course that costs the guest least of its time was chosen, because the rounds do not come down to
    /// the limits. Each course is described by what it would do, the time that the guest would lose, and when
    /// the switch would begin, or why it is not open.
    CourseChosen {
        /// The course; `None` if none is open and the migration gives up.
        taken: Option<String>,
        /// The others.
        not_taken: Vec<String>,
    },
    /// The dirty log counts more pages as written than were, or has another reason to be looked at.
    LogWarning {
        /// The reason, and what mends it.
        why: String,
    },
    /// The guest is slowed, because the rounds do not get smaller, or runs at full speed again.
    Throttled {
        /// By how much, in percent; 0 is full speed.
        percent: u8,
        /// The limit of what all vCPUs together write, in MB/s, if they are slowed by that, each as far as it
        /// writes; `None` if all of them are slowed by a share of their time.
        #[serde(default)]
        write_limit_mbps: Option<f64>,
    },
    /// More downtime is allowed, because the rounds do not get smaller.
    Relaxed {
        /// The new limit, in milliseconds.
        downtime_limit_ms: f64,
    },
    /// The operator has changed the limits; these apply from this round on.
    LimitsChanged(Limits),
    /// The switch begins although it will exceed the downtime limit.
    Stopping {
        /// The predicted downtime, in milliseconds; `None` if nothing was sent yet to measure the bandwidth.
        predicted_downtime_ms: Option<f64>,
    },
    /// Both ends hashed blocks of RAM while the guest ran, so that these need not be hashed while it is
    /// paused.
    Hashed {
        /// The number of blocks, of 2 MiB each.
        blocks: u64,
        /// The number of all the guest's blocks.
        of: u64,
        /// How long it took.
        ms: f64,
    },
    /// The guest is paused for the switch.
    Paused,
    /// GO was sent and no answer came: the source asks the destination for the outcome.
    Asking {
        /// The failure that occurred instead of an answer.
        why: String,
    },
    /// At the destination: a source offers a guest.
    Incoming {
        /// Its name at the source.
        name: String,
        /// The source's address.
        from: SocketAddr,
        /// How much RAM it has.
        ram_bytes: u64,
    },
    /// At the destination: the guest was refused.
    Refused {
        /// The reason that the source receives.
        why: String,
    },
    /// At the destination: the machine is built, and the lanes are connected to its RAM.
    LanesConnected,
    /// At the destination: all pages of a round have arrived.
    RoundClosed {
        /// Its number, from 1.
        number: u32,
    },
    /// At the destination: the guest is ready to run, and the source decides.
    Prepared,
    /// At the destination: the guest was started.
    Running,
    /// The destination runs the guest.
    Switched {
        /// How long no host ran it, in milliseconds.
        downtime_ms: f64,
    },
}

/// Measurements of one round.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// Pages sent.
    pub pages: u64,
    /// Bytes of those pages.
    pub bytes: u64,
    /// Its duration, up to the last fence.
    pub ms: f64,
    /// Bytes of pages over the time for which the busiest lane was sending, all lanes together, in MB/s (10⁶
    /// bytes).
    pub bandwidth_mbps: f64,
    /// New pages that the guest wrote meanwhile, in MB/s; 0 in the last round, in which the guest is paused.
    pub dirty_rate_mbps: f64,
    /// Pages that are left for the last round, because the guest writes them again in each round.
    #[serde(default)]
    pub waiting_pages: u64,
    /// Duration of the harvest of the dirty log after it; 0 in the last round, which follows its harvest.
    pub harvest_ms: f64,
    /// How far the guest was slowed meanwhile, in percent.
    pub throttle_percent: u8,
    /// The limit of the guest's writes by which it was slowed, in MB/s; `None` if it was slowed by a share of
    /// its time, or not at all.
    #[serde(default)]
    pub write_limit_mbps: Option<f64>,
    /// Heartbeats of the guest meanwhile, per second; `None` if it sends no heartbeats, or too few to
    /// measure.
    pub heartbeats_per_second: Option<f64>,
    /// How much of the guest's time throttling took since the round before.
    #[serde(default)]
    pub lost_to_throttling_ms: f64,
    /// How much of the guest's time recording its writes took; `None` if no heartbeat shows that.
    #[serde(default)]
    pub lost_to_tracking_ms: Option<f64>,
    /// Each lane.
    pub lanes: Vec<LaneReport>,
}

/// The work of one lane in a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LaneReport {
    /// Bytes of pages sent.
    pub bytes: u64,
    /// How long it was sending, including waits for the rate limiter; without waits for memory to be
    /// registered, and without scans that found no pages for so long that the send queue ran empty.
    pub busy_ms: f64,
}

/// The parts of the downtime, in milliseconds: as predicted, or as measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DowntimeReport {
    /// Stopping the vCPUs.
    pub pause_ms: f64,
    /// Saving the state of vCPUs and devices.
    pub save_ms: f64,
    /// The last harvest of the dirty log.
    pub harvest_ms: f64,
    /// Waiting until memory for the last pages is registered.
    pub register_ms: f64,
    /// Sending the last pages, without that wait.
    pub send_ms: f64,
    /// Hashing and comparing at both ends, if enabled. Predicted once blocks were hashed while the guest ran.
    pub verify_ms: f64,
    /// Sending the state, and receiving the answer.
    pub transfer_ms: f64,
    /// Revoking remote access at the destination.
    pub revoke_ms: f64,
    /// Loading the state at the destination.
    pub load_ms: f64,
    /// From GO to the report that the guest runs.
    pub start_ms: f64,
    /// The sum of all parts except `verify_ms`.
    pub total_ms: f64,
}

impl From<Downtime> for DowntimeReport {
    fn from(downtime: Downtime) -> Self {
        let total_ms = ms(downtime.total() - downtime.verify);
        let Downtime { pause, save, harvest, register, send, verify, transfer, revoke, load, start } =
            downtime;
        Self {
            pause_ms: ms(pause),
            save_ms: ms(save),
            harvest_ms: ms(harvest),
            register_ms: ms(register),
            send_ms: ms(send),
            verify_ms: ms(verify),
            transfer_ms: ms(transfer),
            revoke_ms: ms(revoke),
            load_ms: ms(load),
            start_ms: ms(start),
            total_ms,
        }
    }
}

/// The report of a whole migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The name of the transport by which the pages travelled, such as `rdma`.
    pub transport: String,
    /// Why the transport before it was abandoned; `None` if there was none. Rounds, pages and bytes count
    /// from then on.
    pub fell_back: Option<String>,
    /// From the call to the destination's report that the guest runs.
    pub total_ms: f64,
    /// The part of `total_ms` until the first round began: connecting, and reserving memory at the
    /// destination. Memory is registered in the rounds.
    pub setup_ms: f64,
    /// From the call until a lane had taken the first run of pages, with its memory registered; `None` if no
    /// page was sent.
    pub first_byte_ms: Option<f64>,
    /// From the pause to the destination's report that the guest runs.
    pub downtime_ms: f64,
    /// The part of `downtime_ms` for hashing and comparing at both ends, if enabled.
    pub verify_ms: f64,
    /// From the guest's last heartbeat at the source to its first at the destination, less the time of one
    /// message; `None` if the guest sends none.
    pub guest_downtime_ms: Option<f64>,
    /// How much of its time the guest lost in all: `downtime_ms`, and the two below.
    pub lost_ms: f64,
    /// The share of the guest's time that throttling took.
    pub lost_to_throttling_ms: f64,
    /// The share that recording its writes took, by its heartbeat before and meanwhile: on a busy host with
    /// what the migration's threads took from its vCPUs. `None` if no heartbeat shows that.
    pub lost_to_tracking_ms: Option<f64>,
    /// The predicted downtime when the switch was decided, by parts; `None` if nothing had been sent by then
    /// to measure the bandwidth.
    pub predicted: Option<DowntimeReport>,
    /// The measured downtime, by parts.
    pub measured: DowntimeReport,
    /// Heartbeats of the guest per second before the first round; `None` if it sends no heartbeats, or too
    /// few to measure.
    pub heartbeats_per_second: Option<f64>,
    /// The limits at the end, as the operator set them.
    pub limits: Limits,
    /// Every round, the first with all of RAM, the last while the guest was paused.
    pub rounds: Vec<RoundReport>,
    /// Bytes of pages sent, all rounds.
    pub bytes_sent: u64,
    /// Pages sent, all rounds.
    pub pages_sent: u64,
    /// Pages that were never touched or all zero in the first round, and so were not sent.
    pub pages_zero: u64,
    /// Bytes of pages over the time of the rounds, in MB/s (10⁶ bytes).
    pub throughput_mbps: f64,
    /// What was compared.
    pub verify: Verify,
    /// Pages that both ends compared as equal.
    pub verified_pages: u64,
    /// Blocks of 2 MiB that were hashed while the guest ran, with digests that stayed valid to the end.
    pub blocks_hashed_running: u64,
    /// Blocks of 2 MiB that were hashed while the guest was paused.
    pub blocks_hashed_paused: u64,
}

/// Bytes over a time, in MB/s (10⁶ bytes).
pub(crate) fn mbps(bytes: u64, time: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let bytes = bytes as f64;
    if time.is_zero() { 0.0 } else { bytes / 1e6 / time.as_secs_f64() }
}

/// A time in milliseconds, for reports and events.
pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
