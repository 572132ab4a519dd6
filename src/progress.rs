//! What a migration tells while it runs, and what it reports at its end.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::convergence::{Downtime, Limits};
use crate::transport::TransportKind;
use crate::verify::Verify;

/// Sees what happens in a migration, as it happens.
///
/// The migrating thread makes these calls, some of them while the guest is paused, so an implementation returns at once: it neither
/// writes to a socket or a terminal nor waits for a lock that is held while somebody does. Queue the event in bounded memory, let
/// another thread pass it on, and lose events where its reader does not keep up; [`Report`] has all that matters in the end.
pub trait Observer: Sync {
    /// Something happened.
    fn event(&self, event: &Event);
}

/// Nobody listens.
impl Observer for () {
    fn event(&self, _event: &Event) {}
}

/// What happens in a migration, at the source where no other end is named.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Event {
    /// The destination is reached and has reserved the guest's RAM.
    Connected {
        /// How the pages will travel.
        transport: TransportKind,
        /// The device or addresses, and why this transport.
        via: String,
        /// The guest's RAM in pages.
        total_pages: u64,
    },
    /// RDMA failed while the guest ran, and the migration begins anew over TCP.
    FellBack {
        /// What failed.
        why: String,
    },
    /// A round is over.
    Round {
        /// Which, from 1.
        number: u32,
        /// What it was like.
        #[serde(flatten)]
        round: RoundReport,
        /// How long the guest would stand still if it were paused now; `None` if something is left to send and nothing was sent
        /// yet that would tell how long that takes.
        predicted_downtime_ms: Option<f64>,
    },
    /// As it looks, the rounds will not come down to the downtime limit. Told once, after the second round at the earliest.
    NotConverging {
        /// Why not.
        why: String,
        /// What would help, any of it.
        help: String,
        /// What the guest wrote of new pages in the last round, in MB/s.
        dirty_rate_mbps: f64,
        /// What the link carries, in MB/s; `None` if nothing was sent yet that would tell.
        bandwidth_mbps: Option<f64>,
    },
    /// The guest is slowed, because the rounds do not get smaller.
    Throttled {
        /// By how much.
        percent: u8,
    },
    /// More downtime is allowed, because the rounds do not get smaller.
    Relaxed {
        /// So much, in milliseconds.
        downtime_limit_ms: f64,
    },
    /// The operator has changed the limits; from this round on they are these.
    LimitsChanged(LimitsReport),
    /// The switch begins although the downtime limit will not be kept.
    Stopping {
        /// How long the guest is expected to stand still, in milliseconds; `None` if nothing was sent yet that would tell.
        predicted_downtime_ms: Option<f64>,
    },
    /// Blocks of RAM were hashed at both ends while the guest ran, so that they need not be while it is paused.
    Hashed {
        /// How many, of 2 MiB.
        blocks: u64,
        /// How many the guest has.
        of: u64,
        /// How long it took.
        ms: f64,
    },
    /// The guest is paused for the switch.
    Paused,
    /// GO was sent and no word came back: the destination is asked what became of the guest.
    Asking {
        /// What happened instead of an answer.
        why: String,
    },
    /// At the destination: a guest wants to come.
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
        /// What the source hears.
        why: String,
    },
    /// At the destination: the machine is made, and the lanes lead to its RAM.
    LanesConnected,
    /// At the destination: all pages of a round have arrived.
    RoundClosed {
        /// Which, from 1.
        number: u32,
    },
    /// At the destination: the guest is ready to run, and the source decides.
    Prepared,
    /// At the destination: the guest was started.
    Running,
    /// The destination runs the guest.
    Switched {
        /// How long nobody ran it, in milliseconds.
        downtime_ms: f64,
    },
}

/// The limits of a migration, in the units of the command line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LimitsReport {
    /// How long the guest may stand still, in milliseconds.
    pub downtime_limit_ms: f64,
    /// How far relaxing may raise that, in milliseconds.
    pub downtime_max_ms: f64,
    /// How fast pages may be sent, in MB/s; `None` is as fast as the link carries them.
    pub bandwidth_limit_mbps: Option<f64>,
    /// How many rounds there may be.
    pub max_rounds: u32,
    /// How long it may take until the switch begins, in seconds.
    pub timeout_s: Option<f64>,
    /// How far the guest may be slowed, in percent.
    pub throttle_max_percent: u8,
    /// The policies, in order, with commas.
    pub if_stuck: String,
}

impl From<&Limits> for LimitsReport {
    fn from(limits: &Limits) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        let mbps = |rate: NonZeroU64| rate.get() as f64 / 1e6;
        Self {
            downtime_limit_ms: ms(limits.downtime),
            downtime_max_ms: ms(limits.downtime_relaxed_max()),
            bandwidth_limit_mbps: limits.bandwidth_max.map(mbps),
            max_rounds: limits.rounds_max,
            timeout_s: limits.timeout.map(|timeout| timeout.as_secs_f64()),
            throttle_max_percent: limits.throttle_max_percent,
            if_stuck: limits.if_stuck.to_string(),
        }
    }
}

/// What one round was like.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// Pages sent.
    pub pages: u64,
    /// Bytes of those pages.
    pub bytes: u64,
    /// How long it took, up to the last fence.
    pub ms: f64,
    /// Bytes of pages over the time for which the busiest lane was sending, all lanes together, in MB/s (10⁶ bytes).
    pub bandwidth_mbps: f64,
    /// How fast the guest wrote new pages meanwhile, in MB/s; 0 in the last round, where it is paused.
    pub dirty_rate_mbps: f64,
    /// How long the harvest of the dirty log after it took; 0 in the last round, whose harvest comes before it.
    pub harvest_ms: f64,
    /// How far the guest was slowed meanwhile, in percent.
    pub throttle_percent: u8,
    /// How often the guest beat meanwhile, in beats a second; `None` if it gives no heartbeat, or gave too few to tell.
    pub heartbeats_per_second: Option<f64>,
    /// Each lane.
    pub lanes: Vec<LaneReport>,
}

/// What one lane did in a round.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LaneReport {
    /// Bytes of pages sent.
    pub bytes: u64,
    /// How long it was sending, the wait for the pace of a bandwidth limit included; without waiting for memory to be registered,
    /// or finding nothing to send for so long that what it had sent was gone.
    pub busy_ms: f64,
}

/// Where the time went in which nobody ran the guest, in milliseconds: as it was predicted, or as it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DowntimeReport {
    /// Stopping the vCPUs.
    pub pause_ms: f64,
    /// Saving their state and that of devices.
    pub save_ms: f64,
    /// The last harvest of the dirty log.
    pub harvest_ms: f64,
    /// Waiting for memory of the last pages to be registered.
    pub register_ms: f64,
    /// Sending them, without that.
    pub send_ms: f64,
    /// Hashing and comparing at both ends, if that was asked for. Predicted once blocks were hashed while the guest ran.
    pub verify_ms: f64,
    /// Sending the state, and the answer to it.
    pub transfer_ms: f64,
    /// Taking remote access away at the destination.
    pub revoke_ms: f64,
    /// Loading the state there.
    pub load_ms: f64,
    /// From GO to the word that the guest runs.
    pub start_ms: f64,
    /// All of it without that.
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

/// The whole migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// How the pages travelled.
    pub transport: TransportKind,
    /// Why RDMA was given up for TCP on the way; `None` if it was not. Rounds, pages and bytes are those since then.
    pub fell_back: Option<String>,
    /// From the call to the destination's word that the guest runs.
    pub total_ms: f64,
    /// Of that, until the first round began: connecting, and reserving at the destination. Memory is registered in the rounds.
    pub setup_ms: f64,
    /// From the call until a lane had taken the first run of pages, its memory registered; `None` if no page travelled.
    pub first_byte_ms: Option<f64>,
    /// From the pause to the destination's word that the guest runs.
    pub downtime_ms: f64,
    /// Of that, hashing and comparing at both ends, if that was asked for.
    pub verify_ms: f64,
    /// From the guest's last heartbeat at the source to its first at the destination, less the flight of one message;
    /// `None` if the guest gives none.
    pub guest_downtime_ms: Option<f64>,
    /// The downtime that was predicted when the switch was decided, by parts; `None` if nothing had been sent by then that would
    /// tell how long the rest takes.
    pub predicted: Option<DowntimeReport>,
    /// The downtime as it was, by parts.
    pub measured: DowntimeReport,
    /// How often the guest beat in a second before the first round; `None` if it gives no heartbeat, or gave too few to tell.
    pub heartbeats_per_second: Option<f64>,
    /// The limits at the end, as they were asked for.
    pub limits: LimitsReport,
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
    /// What was to be compared.
    pub verify: Verify,
    /// Pages that both ends compared and found equal.
    pub verified_pages: u64,
    /// Blocks of 2 MiB whose digests from while the guest ran were good to the end.
    pub blocks_hashed_running: u64,
    /// Blocks of 2 MiB that were hashed while it was paused.
    pub blocks_hashed_paused: u64,
}

/// Bytes over a time, in MB/s (10⁶ bytes).
pub(crate) fn mbps(bytes: u64, time: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let bytes = bytes as f64;
    if time.is_zero() { 0.0 } else { bytes / 1e6 / time.as_secs_f64() }
}

/// A time as reports and events have it.
pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
