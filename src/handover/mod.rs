//! Who owns the VM: two state machines that decide, and the sequence of records that outlives them.
//!
//! They use no socket, file or clock. A driver ([`source`](crate::source),
//! [`destination`](crate::destination)) reports each event to its machine and carries out the resulting
//! action, one at a time. The rule:
//!
//! * The source runs the guest only if it never handed it over, or if the destination has refused this very
//!   attempt. COMMITTED is durable *before* the first GO leaves, and marks the guest as handed over.
//! * The destination runs the guest only on GO for its attempt, once remote access is revoked, memory is
//!   compared, state is loaded, and RUNNING is durable. It abandons a guest that was ready to run only by
//!   recording REFUSED before it reports the refusal.
//!
//! So the two sides never both run the guest. When the link is lost in between, the source is in doubt: it
//! keeps the guest paused and asks. The destination answers from its records.
//!
//! # The source
//!
//! | state | event | next | action |
//! |---|---|---|---|
//! | running | pausing | paused | pause, send the rest and FINAL |
//! | paused | FINAL sent | awaiting PREPARED | await PREPARED |
//! | awaiting PREPARED | PREPARED | committing | record COMMITTED |
//! | running, paused, awaiting PREPARED | failed, REFUSED | kept | resume |
//! | committing | recorded | awaiting RUNNING | send GO |
//! | | not recorded | withdrawing | record REFUSED |
//! | withdrawing | recorded | kept | resume |
//! | | not recorded | withdrawn | withdraw: the destination is to refuse |
//! | withdrawn | failed, PREPARED, fenced | withdrawing | record REFUSED |
//! | awaiting RUNNING, in doubt | RUNNING | releasing | record DONE |
//! | | REFUSED | taking back | record REFUSED |
//! | | PREPARED | the same | send GO (again) |
//! | | failed | in doubt | ask |
//! | in doubt | the other host is fenced | word pending | ask, and send no GO |
//! | word pending | failed: no sign of life | fencing | record REFUSED |
//! | | PREPARED, a sign of life | in doubt | ask |
//! | word pending, withdrawn | RUNNING | releasing | record DONE |
//! | | REFUSED | taking back | record REFUSED |
//! | fencing | recorded | kept | resume |
//! | | not recorded | in doubt | ask |
//! | taking back | recorded or not | kept | resume |
//! | releasing | recorded or not | released | release |
//!
//! The operator's word is the one input that the machine cannot check. So any sign of life of the destination
//! voids it, and no GO leaves while a word is pending: a destination that answers "ready" is not fenced, and
//! would run the guest on that GO.
//!
//! A write that failed may still be on the disk. After a crash a COMMITTED record leads to a question, and to
//! GO for a destination that is still ready. So a guest with an unsure COMMITTED resumes only once REFUSED
//! is durable at the source or at the destination.
//!
//! # The destination
//!
//! | state | event | next | action |
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
//! In the last line, and where PREPARED is not recorded, REFUSED is not recorded either: before PREPARED is
//! sent the source has no doubt that a record would have to settle.
//!
//! # After a crash
//!
//! `recover` builds a machine from the last record. At the source COMMITTED means in doubt; only a guest that
//! is seen *running* proves that it was not handed over. At the destination PREPARED without RUNNING proves
//! that the guest never ran, because RUNNING is durable before the first vCPU starts: it becomes REFUSED.
//! RUNNING stays RUNNING, even when nothing runs any more: "not running now" does not prove "never ran", and
//! a guest that has run may have written to its disks.
//!
//! A sequence without a record of an attempt proves nothing. A source asks only after it received PREPARED,
//! which is durable before it is sent. So a sequence without PREPARED is another one: lost, wiped, from
//! another host, or wrapped around since.
//!
//! [`Standing`] is what the last record states about a guest after its process ended: whether it may be
//! started anew.

mod destination;
mod journal;
mod source;
mod standing;

use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

pub use destination::{DestinationAction, DestinationEvent, DestinationHandover, DestinationState};
pub use journal::{JOURNAL_LEN, Journal, JournalError, PEER_MAX, Record, RecordKind, Side, WRITE_LEN};
pub use source::{GuestHere, SourceAction, SourceEvent, SourceHandover, SourceState};
pub use standing::Standing;

use crate::error_code::coded;
use crate::wire::AttemptId;

/// An event that is not allowed in the current state. The state is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error, EnumDiscriminants)]
#[strum_discriminants(
    name(HandoverErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum HandoverError {
    /// The message belongs to another attempt.
    #[error("a message of migration attempt {got:?} arrived in attempt {ours:?} and is rejected")]
    OtherAttempt {
        /// This attempt.
        ours: AttemptId,
        /// The attempt that the message names.
        got: AttemptId,
    },
    /// The driver did something other than what its state machine asked for.
    #[error("the handover requires another action now; this is a defect of sterna")]
    OtherAction,
    /// The protocol does not allow this event in this state.
    #[error("the handover cannot process `{event}` in state `{state}`")]
    OutOfTurn {
        /// The event.
        event: &'static str,
        /// The state.
        state: &'static str,
    },
    /// The journal holds a record that only the other side writes.
    #[error(
        "the journal says {0}, which only the other side of a migration writes; is it this side's journal?"
    )]
    OtherSide(RecordKind),
}

coded!(HandoverError, HandoverErrorKind, "handover");
