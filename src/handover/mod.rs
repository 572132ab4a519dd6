//! Who owns the VM: two small state machines that decide, and do nothing else.
//!
//! They touch no socket and read no clock. A driver ([`source`](crate::source), [`destination`](crate::destination)) tells
//! each what happened and does what it answers. The rule they keep:
//!
//! * the source runs the guest only if it never *attempted* to send GO, or if the destination has said of this very epoch
//!   that it did not run and will not;
//! * the destination runs it only on GO for its epoch, once memory is revoked, compared and loaded.
//!
//! So the two never both run it. When the link is lost in between, the source does not know, keeps the guest paused and
//! says so: in doubt.

mod destination;
mod source;

use thiserror::Error;

pub use destination::{DestinationAction, DestinationEvent, DestinationHandover, DestinationState};
pub use source::{SourceAction, SourceEvent, SourceHandover, SourceState};

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
}
