//! The faults of writes and fences, and of either end.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;

use sterna_rdma::{CompletionError, CompletionStatus};

use crate::poison::IgnorePoison;
use crate::transport::error::TransportError;
use crate::transport::tcp::TcpReceiver;

/// A fault of a write.
#[derive(Debug)]
pub(crate) enum WriteFault {
    /// It never leaves, and no error is reported.
    Drop,
    /// It leaves later, and so do all later writes.
    Delay(Duration),
    /// It leaves twice.
    Repeat,
    /// It leaves behind this many writes of other pages, or before the fence.
    Late(u32),
    /// It leaves, and a copy of the pages is kept for [`FenceFault::WriteOld`].
    KeepOld,
    /// It waits for other lanes.
    Meet(Arc<Barrier>),
    /// The connection ends.
    Cut,
    /// It completes with this status.
    Fail(CompletionStatus),
    /// The lane panics.
    Panic,
}

/// A fault of a fence.
#[derive(Debug)]
pub(crate) enum FenceFault {
    /// It never leaves, and no error is reported. Delayed writes leave with the next fence.
    Drop,
    /// It leaves later.
    Delay(Duration),
    /// It leaves twice.
    Repeat,
    /// After it, the copies of [`WriteFault::KeepOld`] leave, over what was written since.
    WriteOld,
    /// The connection ends before it.
    Cut,
    /// The connection ends once it was answered.
    CutAfter,
    /// It completes with this status.
    Fail(CompletionStatus),
    /// The lane panics.
    Panic,
}

/// The faults of the source.
#[derive(Debug, Default)]
pub(crate) struct LaneFaults {
    /// Whether guest RAM is registered in each round before pages are written, as with RDMA. The lane
    /// receiver must be a faulty one then.
    pub(crate) registers: bool,
    /// The lanes do not connect.
    pub(crate) connect: Once,
    /// The source does not register guest RAM.
    pub(crate) registration: Once,
    pub(super) writes: Mutex<Vec<Armed<WriteFault>>>,
    pub(super) fences: Mutex<Vec<Armed<FenceFault>>>,
    struck: AtomicUsize,
}

#[derive(Debug)]
pub(super) struct Armed<F> {
    lane: usize,
    /// How many calls pass before it strikes.
    after: u32,
    fault: F,
}

impl LaneFaults {
    /// Lanes that first register guest RAM.
    pub(crate) fn registering() -> Self {
        Self { registers: true, ..Self::default() }
    }

    /// Arms this fault for a write of this lane, after `after` other writes. Faults of the same lane strike
    /// one after the other.
    pub(crate) fn arm_write(&self, lane: usize, after: u32, fault: WriteFault) {
        self.writes.lock().ignore_poison().push(Armed { lane, after, fault });
    }

    /// Arms this fault for the next fence of this lane.
    pub(crate) fn arm_fence(&self, lane: usize, fault: FenceFault) {
        self.fences.lock().ignore_poison().push(Armed { lane, after: 0, fault });
    }

    /// How many faults have struck.
    pub(crate) fn struck(&self) -> usize {
        let once = [&self.connect, &self.registration].into_iter().filter(|once| once.has_struck()).count();
        self.struck.load(Ordering::Relaxed) + once
    }

    pub(super) fn strike<F>(&self, armed: &Mutex<Vec<Armed<F>>>, lane: usize) -> Option<F> {
        let mut armed = armed.lock().ignore_poison();
        let next = armed.iter().position(|fault| fault.lane == lane)?;
        if armed[next].after > 0 {
            armed[next].after -= 1;
            return None;
        }
        self.struck.fetch_add(1, Ordering::Relaxed);
        Some(armed.remove(next).fault)
    }
}

/// The faults of the destination.
#[derive(Debug, Default)]
pub(crate) struct ReceiverFaults {
    /// Guest RAM is not registered.
    pub(crate) register: Once,
    /// A round does not end.
    pub(crate) await_round: Once,
    /// The device does not release a queue pair.
    pub(crate) revoke: Once,
    /// The device does not release memory after remote access was revoked.
    pub(crate) release: Once,
    /// How long to wait for the fences of a round; `None`: as long as in production.
    pub(super) patience: Option<Duration>,
    /// How many receivers were dropped because a round did not end, for any reason.
    pub(super) given_up: AtomicUsize,
    /// The ends of lanes that a device did not release: the source can write on.
    pub(super) kept: Mutex<Vec<TcpReceiver>>,
}

impl ReceiverFaults {
    /// No fault except for fences that do not come within this time.
    pub(crate) fn impatient(patience: Duration) -> Self {
        Self { patience: Some(patience), ..Self::default() }
    }

    /// Whether any fault struck, including faults of the lanes. If it was a round's, the lanes are closed by
    /// then, so that the source notices.
    pub(crate) fn has_struck(&self) -> bool {
        self.given_up.load(Ordering::Relaxed) > 0 || self.register.has_struck() || self.revoke.has_struck()
    }
}

/// An error that strikes once.
#[derive(Debug, Default)]
pub(crate) struct Once(Mutex<Strike>);

#[derive(Debug, Default)]
enum Strike {
    #[default]
    Unarmed,
    Armed(TransportError),
    Struck,
}

impl Once {
    pub(crate) fn arm(&self, error: TransportError) {
        *self.0.lock().ignore_poison() = Strike::Armed(error);
    }

    pub(crate) fn has_struck(&self) -> bool {
        matches!(*self.0.lock().ignore_poison(), Strike::Struck)
    }

    /// Fails with the error, if it is armed.
    pub(super) fn strike(&self) -> Result<(), TransportError> {
        let mut strike = self.0.lock().ignore_poison();
        if !matches!(*strike, Strike::Armed(_)) {
            return Ok(());
        }
        match std::mem::replace(&mut *strike, Strike::Struck) {
            Strike::Armed(error) => Err(error),
            Strike::Unarmed | Strike::Struck => Ok(()),
        }
    }
}

/// A request that completed with this status.
pub(crate) fn completed_with(lane: usize, status: CompletionStatus) -> TransportError {
    TransportError::Write { lane, error: CompletionError { status, vendor_code: 0 } }
}
