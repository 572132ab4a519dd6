//! Who owns the VM: two state machines that decide, the journal that outlives them, and nothing else.
//!
//! They touch no socket and no file and read no clock. A driver ([`source`](crate::source),
//! [`destination`](crate::destination)) tells each what happened and does what it answers, one thing at a time. The rule they keep:
//!
//! * the source runs the guest only if it never gave it away, which COMMITTED in its journal marks *before* the first GO
//!   leaves, or if the destination has said of this very epoch that it did not run and will not;
//! * the destination runs it only on GO for its epoch, once memory is revoked, compared and loaded, and once RUNNING is in its
//!   journal; it gives up what it was ready to run only by writing REFUSED, before it says so.
//!
//! So the two never both run it. When the link is lost in between, the source does not know, keeps the guest paused and asks:
//! in doubt. What the destination answers is what its journal says.
//!
//! # The source
//!
//! | state | event | next | what is to be done |
//! |---|---|---|---|
//! | running | pausing | paused | |
//! | paused | FINAL sent | awaiting PREPARED | |
//! | awaiting PREPARED | PREPARED | committing | record COMMITTED |
//! | committing | recorded | awaiting RUNNING | send GO |
//! | committing | not recorded | taking back | record REFUSED |
//! | awaiting RUNNING, in doubt | RUNNING | releasing | record DONE |
//! | | REFUSED | taking back | record REFUSED |
//! | | PREPARED | the same | send GO (again) |
//! | | failed | in doubt | ask |
//! | in doubt | the other host is fenced | taking back | record REFUSED |
//! | taking back | recorded or not | kept | resume |
//! | releasing | recorded or not | released | release |
//! | running, paused, awaiting PREPARED | failed, REFUSED | kept | resume |
//!
//! # The destination
//!
//! | state | event | next | what is to be done |
//! |---|---|---|---|
//! | receiving | FINAL | revoking | revoke |
//! | revoking | revoked | loading | compare and load |
//! | loading | loaded | preparing | record PREPARED |
//! | preparing | recorded | prepared | send PREPARED |
//! | | not recorded | refused | discard, send REFUSED |
//! | prepared | GO, the other host is fenced | committing to run | record RUNNING |
//! | | asked | the same | send PREPARED (again) |
//! | | failed | refusing | record REFUSED |
//! | committing to run | recorded | starting | run |
//! | | not recorded | refusing | record REFUSED |
//! | starting | started | running | send RUNNING |
//! | | not started | refusing | record REFUSED |
//! | running | GO, asked | the same | send RUNNING (again) |
//! | refusing | recorded | refused | discard, send REFUSED |
//! | | not recorded | unwilling | discard, say nothing |
//! | unwilling | GO, asked, failed | refusing | record REFUSED |
//! | refused | GO, asked | the same | send REFUSED (again) |
//! | receiving, revoking, loading | failed | refused | discard, send REFUSED |
//!
//! In the last line, and where PREPARED is not recorded, REFUSED is not either: before PREPARED was sent the source has no doubt
//! that a record would have to settle.
//!
//! # After a crash
//!
//! `recover` makes a machine of the last record. At the source COMMITTED means in doubt; only a guest that is seen *running*
//! there proves that it was not given away. At the destination PREPARED without RUNNING proves that the guest never ran, as RUNNING
//! is durable before the first vCPU starts: it becomes REFUSED. RUNNING stays RUNNING, also when nothing runs any more: "not running
//! now" does not prove "never ran", and a guest that has run there may have written to its disks.
//!
//! A journal without a word of an epoch proves nothing. A source asks only after it heard PREPARED, which is durable before it
//! is sent; so a journal without it is another one: lost, wiped, of another host, or gone round since.

mod destination;
mod journal;
mod source;

use thiserror::Error;

pub use destination::{DestinationAction, DestinationEvent, DestinationHandover, DestinationState};
pub use journal::{BootId, JOURNAL_LEN, Journal, JournalError, Mark, PEER_MAX, Record, Side, WRITE_LEN};
pub use source::{GuestHere, SourceAction, SourceEvent, SourceHandover, SourceState};

use crate::wire::Epoch;

/// An event that may not happen in the state in which it did. The state is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HandoverError {
    /// A message of another attempt.
    #[error("a message of migration attempt {got:?} came in attempt {ours:?}; it is not followed")]
    OtherEpoch {
        /// This attempt.
        ours: Epoch,
        /// The message's.
        got: Epoch,
    },
    /// A driver went on with something else than what its state machine wants done.
    #[error("the handover wants something else to be done now; this is a defect of sterna")]
    OtherAction,
    /// An event that the protocol does not have in this state.
    #[error("the handover cannot take `{event}` while `{state}`")]
    OutOfTurn {
        /// What happened.
        event: &'static str,
        /// In which state.
        state: &'static str,
    },
    /// A record that the other side writes.
    #[error(
        "the journal says {0}, which only the other side of a migration writes; is it this side's journal?"
    )]
    OtherSide(Mark),
}
