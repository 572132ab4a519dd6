//! How a guest is to be received.

use std::time::Duration;

use super::pending::PendingArrival;
use crate::lock::Lock;
use crate::saved_state::STATE_MAX_DEFAULT;
use crate::session::Cancel;
use crate::transport::Transports;

/// How a guest is to be received.
#[derive(Clone, Debug)]
pub struct Options {
    /// By which transports pages are received; the order means nothing, since the source's offer names one.
    pub transports: Transports,
    /// The longest saved state that is taken, in bytes; `None`: 1 GiB. It is held in memory until it is loaded.
    pub state_max_bytes: Option<u64>,
    /// How long a guest that is ready is held when its source is lost; it is given up then. Ten minutes by default.
    pub takeover_timeout: Duration,
    /// What arbitrates between the two hosts. Only a guest that has it at its source is taken, and it is taken before that guest
    /// runs here. Keep a clone for as long as the guest runs.
    pub lock: Option<Lock>,
    /// The operator's handle on the guest while it arrives.
    pub pending: PendingArrival,
    /// Ends the wait for a guest, and an arrival up to PREPARED, when asked to. From PREPARED on the source decides.
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
