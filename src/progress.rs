//! What a migration tells while it runs, and what it reports at its end.

use serde::{Deserialize, Serialize};

use crate::transport::TransportKind;

/// Told what happens, as it happens, on the migrating thread: return soon.
pub trait Observer: Sync {
    /// Something happened.
    fn event(&self, event: &Event);
}

/// Nobody listens.
impl Observer for () {
    fn event(&self, _event: &Event) {}
}

/// What happens in a migration, at the source.
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
    /// A round is over.
    Round {
        /// Which, from 1.
        number: u32,
        /// What it was like.
        #[serde(flatten)]
        round: RoundReport,
        /// How long the guest would stand still if it were paused now.
        predicted_downtime_ms: f64,
    },
    /// The guest is slowed, because the rounds do not get smaller.
    Throttled {
        /// By how much.
        percent: u8,
    },
    /// The guest is paused for the switch.
    Paused,
    /// The destination runs the guest.
    Switched {
        /// How long nobody ran it, in milliseconds.
        downtime_ms: f64,
    },
}

/// What one round was like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// Pages sent.
    pub pages: u64,
    /// Bytes of those pages.
    pub bytes: u64,
    /// How long it took, up to the last fence.
    pub ms: f64,
    /// How fast the guest wrote new pages meanwhile, in MB/s (10⁶ bytes); 0 in the last round, where it is paused.
    pub dirty_rate_mbps: f64,
}

/// The whole migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// How the pages travelled.
    pub transport: TransportKind,
    /// From the call to the destination's word that the guest runs.
    pub total_ms: f64,
    /// Of that, until the first round began: connecting, and reserving at the destination. Memory is registered in the rounds.
    pub setup_ms: f64,
    /// From the pause to the destination's word that the guest runs.
    pub downtime_ms: f64,
    /// Of that, comparing all of RAM, if that was asked for.
    pub compare_ms: f64,
    /// From the guest's last heartbeat at the source to its first at the destination, less the flight of one message;
    /// `None` if the guest gives none.
    pub guest_downtime_ms: Option<f64>,
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
    /// Pages that both ends compared at the switch and found equal.
    pub verified_pages: u64,
}
