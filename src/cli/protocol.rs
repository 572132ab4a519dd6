//! What is said over a control socket: one JSON object a line, a request first, then answers.

use serde::{Deserialize, Serialize};
use sterna::convergence::Limits;
use sterna::progress::{Event, Report};
use sterna::source::Options;
use sterna::transport::TransportChoice;
use sterna_vmm::MachineKind;

use super::exit::Exit;

/// What the holder of a guest may be asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub(crate) enum Request {
    /// How the guest is doing.
    Status,
    /// Move it. Answered by events, then by a report or a failure.
    Migrate(Move),
    /// End a migration that is under way.
    Cancel,
    /// Let the guest check its own memory.
    Check,
    /// Destroy the guest and end.
    Stop,
}

/// A migration as it is asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Move {
    pub(crate) to: String,
    pub(crate) transport: Transport,
    pub(crate) lanes: Option<u8>,
    pub(crate) downtime_limit_ms: u64,
    pub(crate) rounds_max: u32,
    pub(crate) throttle_max_percent: u8,
    pub(crate) compare: bool,
}

/// The transports that can be asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Transport {
    /// RDMA where a device reaches the peer, else TCP
    #[default]
    Auto,
    /// TCP
    Tcp,
    /// RDMA, or fail
    Rdma,
}

impl From<Transport> for TransportChoice {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Auto => Self::Auto,
            Transport::Tcp => Self::Tcp,
            Transport::Rdma => Self::Rdma,
        }
    }
}

/// What the holder answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub(crate) enum Answer {
    /// To `status`.
    Status(Status),
    /// During `migrate`.
    Progress(Event),
    /// The end of a `migrate` that succeeded.
    Moved(Report),
    /// To `check`.
    Checked(Checked),
    /// To `cancel` and `stop`.
    Done,
    /// Not done.
    Failed(Failure),
}

/// How a guest is doing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) name: String,
    pub(crate) kind: MachineKind,
    pub(crate) phase: String,
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: u8,
    pub(crate) migrating: bool,
    pub(crate) heartbeats: u64,
    /// How often the count of heartbeats did not go on from where it was.
    pub(crate) heartbeat_regressions: u64,
    /// Passes over the working set.
    pub(crate) passes: u64,
    pub(crate) throttle_percent: u8,
}

/// What a guest found of its own memory.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Checked {
    pub(crate) pages: u64,
    pub(crate) wrong: u64,
}

/// Why something was not done, and where the guest is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    pub(crate) what: String,
    /// Where the guest is, as a clause.
    pub(crate) guest: String,
}

impl Move {
    pub(crate) fn options(&self) -> Options {
        Options {
            transport: self.transport.into(),
            lanes: self.lanes,
            limits: Limits {
                downtime: std::time::Duration::from_millis(self.downtime_limit_ms),
                rounds_max: self.rounds_max,
                throttle_max_percent: self.throttle_max_percent,
            },
            compare: self.compare,
            ..Options::default()
        }
    }
}
