//! How a migration is to be done.

use super::limits_handle::LimitsHandle;
use crate::convergence::SwitchCost;
use crate::lock::Lock;
use crate::session::Cancel;
use crate::transport::Transports;
use crate::verify::Verify;

/// How a migration is to be done.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// By which transports, in the order in which they are tried.
    pub transports: Transports,
    /// Over how many lanes, at most 64; `None`: 4 for RDMA, as many as processors and at most 4 for TCP.
    pub lanes: Option<u8>,
    /// When to switch, what to do when it does not come to that, and when to give up.
    pub limits: LimitsHandle,
    /// What a switch is expected to cost where that cannot be measured beforehand.
    pub switch_cost: SwitchCost,
    /// The longest state of vCPUs and devices that is sent, in bytes; `None`: 1 GiB. The destination has a limit of its own.
    pub state_max_bytes: Option<u64>,
    /// How much of RAM both ends compare. What it adds to the downtime is in the report.
    pub verify: Verify,
    /// What arbitrates between the two hosts. It must be held already, and the destination must have it too. After the migration the
    /// guest runs here exactly if it is held here.
    pub lock: Option<Lock>,
    /// Ends the migration when asked to.
    pub cancel: Cancel,
}
