//! The options of a migration.

use super::limits_handle::LimitsHandle;
use crate::control::Security;
use crate::convergence::SwitchCost;
use crate::lock::Lock;
use crate::session::Cancel;
use crate::transport::Transports;
use crate::verify::Verify;

/// The options of a migration.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The transports, in the order of the attempts.
    pub transports: Transports,
    /// The number of lanes, at most 64; `None`: 4 for RDMA, as many as processors and at most 4 for TCP.
    pub lanes: Option<u8>,
    /// When to switch, what to do when the rounds do not get short enough, and when to give up.
    pub limits: LimitsHandle,
    /// The expected cost of a switch where it cannot be measured beforehand.
    pub switch_cost: SwitchCost,
    /// The longest state of vCPUs and devices to send, in bytes; `None`: 1 GiB. The destination has its own
    /// limit.
    pub state_max_bytes: Option<u64>,
    /// How much of RAM both ends compare. The report shows the effect on the downtime.
    pub verify: Verify,
    /// The lock that arbitrates between the two hosts. This process must hold it already, and the destination
    /// must have the same lock. After the migration the guest runs on this host exactly if this host holds
    /// the lock.
    pub lock: Option<Lock>,
    /// How the connections to the destination are protected, also those that settle a doubt.
    pub security: Security,
    /// Ends the migration on request.
    pub cancel: Cancel,
}
