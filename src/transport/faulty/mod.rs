//! Transports with faults, for tests: real TCP lanes that pass for RDMA's, and do to the writes they are told to what a device, a
//! network or a defect would do.
//!
//! A thread that migrates [with faulty lanes](with_lanes) gets them in the place of RDMA, so whatever is done about them is done by the
//! code that does it in production, also the choice of TCP instead. One that receives [with a faulty lane_receiver](with_lane_receiver)
//! gets that for the first guest that arrives.
//!
//! A fault is *armed* and then *strikes*, once: a test arms it when the moment has come, and asks in the end whether it struck.

mod lanes;
mod receiver;
mod registration;

use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::time::Duration;

use sterna_rdma::{CompletionError, CompletionStatus};

pub(crate) use lanes::FaultyOffer;
pub(crate) use receiver::{FaultyReceiver, ReceiverFaults};

use super::TransportError;

thread_local! {
    static LANES: RefCell<Option<Arc<LaneFaults>>> = const { RefCell::new(None) };
    static LANDING: RefCell<Option<Arc<ReceiverFaults>>> = const { RefCell::new(None) };
}

/// Does what makes lanes, on this thread, with faulty ones for RDMA.
pub(crate) fn with_lanes<T>(faults: &Arc<LaneFaults>, work: impl FnOnce() -> T) -> T {
    LANES.set(Some(faults.clone()));
    let done = work();
    LANES.set(None);
    done
}

/// Does what makes a lane receiver, on this thread, with a faulty one the first time.
pub(crate) fn with_lane_receiver<T>(faults: &Arc<ReceiverFaults>, work: impl FnOnce() -> T) -> T {
    LANDING.set(Some(faults.clone()));
    let done = work();
    LANDING.set(None);
    done
}

/// The faults of lanes that are made on this thread.
pub(super) fn lanes_here() -> Option<Arc<LaneFaults>> {
    LANES.with_borrow(Clone::clone)
}

/// Those of the next lane receiver: lanes that come after it in the same attempt take its place, and are sound.
pub(super) fn lane_receiver_here() -> Option<Arc<ReceiverFaults>> {
    LANDING.take()
}

/// What befalls a write.
#[derive(Debug)]
pub(crate) enum WriteFault {
    /// It never leaves, and nobody is told.
    Drop,
    /// It leaves later, and so does all that comes after.
    Delay(Duration),
    /// It leaves twice.
    Repeat,
    /// It leaves behind so many writes of other pages, or before the fence.
    Late(u32),
    /// It leaves, and a copy of the pages as they are now is kept for [`FenceFault::WriteOld`].
    KeepOld,
    /// It waits for other lanes.
    Meet(Arc<Barrier>),
    /// The connection ends.
    Cut,
    /// It completes with this.
    Fail(CompletionStatus),
    /// The lane comes upon a defect of its own.
    Panic,
}

/// What befalls a fence.
#[derive(Debug)]
pub(crate) enum FenceFault {
    /// It never leaves, and nobody is told. What it would have pushed out leaves with the next.
    Drop,
    /// It leaves later.
    Delay(Duration),
    /// It leaves twice.
    Repeat,
    /// Behind it leaves what was kept of [`WriteFault::KeepOld`], over what was written since.
    WriteOld,
    /// The connection ends before it.
    Cut,
    /// The connection ends once it was answered.
    CutAfter,
    /// It completes with this.
    Fail(CompletionStatus),
    /// The lane comes upon a defect of its own.
    Panic,
}

/// What goes wrong at the source.
#[derive(Debug, Default)]
pub(crate) struct LaneFaults {
    /// Whether guest RAM is registered in each round before pages are written, as RDMA does. The lane receiver must be a faulty one then.
    pub(crate) registers: bool,
    /// The lanes do not connect.
    pub(crate) connect: Once,
    /// Guest RAM is not registered here.
    pub(crate) registration: Once,
    writes: Mutex<Vec<Armed<WriteFault>>>,
    fences: Mutex<Vec<Armed<FenceFault>>>,
    struck: AtomicUsize,
}

#[derive(Debug)]
struct Armed<F> {
    lane: usize,
    /// How many calls pass before it strikes.
    after: u32,
    fault: F,
}

impl LaneFaults {
    /// Lanes that first have guest RAM registered.
    pub(crate) fn registering() -> Self {
        Self { registers: true, ..Self::default() }
    }

    /// Has this befall a write of this lane, `after` so many others. Faults of the same lane strike one after the other.
    pub(crate) fn arm_write(&self, lane: usize, after: u32, fault: WriteFault) {
        self.writes.lock().unwrap_or_else(PoisonError::into_inner).push(Armed { lane, after, fault });
    }

    /// Has this befall the next fence of this lane.
    pub(crate) fn arm_fence(&self, lane: usize, fault: FenceFault) {
        self.fences.lock().unwrap_or_else(PoisonError::into_inner).push(Armed { lane, after: 0, fault });
    }

    /// How many faults have struck.
    pub(crate) fn struck(&self) -> usize {
        let once = [&self.connect, &self.registration].into_iter().filter(|once| once.has_struck()).count();
        self.struck.load(Ordering::Relaxed) + once
    }

    fn strike<F>(&self, armed: &Mutex<Vec<Armed<F>>>, lane: usize) -> Option<F> {
        let mut armed = armed.lock().unwrap_or_else(PoisonError::into_inner);
        let next = armed.iter().position(|fault| fault.lane == lane)?;
        if armed[next].after > 0 {
            armed[next].after -= 1;
            return None;
        }
        self.struck.fetch_add(1, Ordering::Relaxed);
        Some(armed.remove(next).fault)
    }
}

/// An error that comes once.
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
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Strike::Armed(error);
    }

    pub(crate) fn has_struck(&self) -> bool {
        matches!(*self.0.lock().unwrap_or_else(PoisonError::into_inner), Strike::Struck)
    }

    /// The error, if it is armed.
    fn strike(&self) -> Result<(), TransportError> {
        let mut strike = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !matches!(*strike, Strike::Armed(_)) {
            return Ok(());
        }
        match std::mem::replace(&mut *strike, Strike::Struck) {
            Strike::Armed(error) => Err(error),
            Strike::Unarmed | Strike::Struck => Ok(()),
        }
    }
}

/// A request that completed with this.
pub(crate) fn completed_with(lane: usize, status: CompletionStatus) -> TransportError {
    TransportError::Write { lane, error: CompletionError { status, vendor_code: 0 } }
}
