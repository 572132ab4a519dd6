//! The options of receiving a guest.

use std::time::Duration;

use super::pending::PendingArrival;
use crate::lock::Lock;
use crate::saved_state::STATE_MAX_DEFAULT;
use crate::session::Cancel;
use crate::transport::Transports;

/// The options of receiving a guest.
#[derive(Clone, Debug)]
pub struct Options {
    /// The transports for receiving pages, in any order, because the source's offer names one.
    pub transports: Transports,
    /// The longest saved state to accept, in bytes; `None`: 1 GiB. Memory holds it until it is loaded.
    pub state_max_bytes: Option<u64>,
    /// How long to hold a ready guest after its source is lost, before giving it up. Ten minutes by default.
    pub takeover_timeout: Duration,
    /// The lock that arbitrates between the two hosts. Only a guest with the same lock at its source is
    /// accepted, and the lock is taken before the guest runs on this host. Keep a clone as long as the guest
    /// runs.
    pub lock: Option<Lock>,
    /// The operator's handle on the guest while it arrives.
    pub pending: PendingArrival,
    /// Ends the wait for a guest, and an arrival up to PREPARED, on request. From PREPARED on the source
    /// decides. Several guests that arrive at once need one each.
    pub cancel: Cancel,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            transports: Transports::default(),
            state_max_bytes: None,
            takeover_timeout: TAKEOVER_TIMEOUT,
            lock: None,
            pending: PendingArrival::default(),
            cancel: Cancel::default(),
        }
    }
}

impl Options {
    pub(super) fn state_max_bytes(&self) -> u64 {
        self.state_max_bytes.unwrap_or(STATE_MAX_DEFAULT)
    }
}

const TAKEOVER_TIMEOUT: Duration = Duration::from_secs(600);
