//! The matrix itself.

use Cell::{DoubtThenMoves, DoubtThenStays, Either, Held, Lost, Moves, Never, NotMoved, RanThere, Stays};

/// Declares an enumeration together with the list of all its variants.
macro_rules! listed {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident),+ $(,)? }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum $name { $($(#[$doc])* $variant),+ }
        impl $name {
            pub(crate) const ALL: &[Self] = &[$(Self::$variant),+];
        }
    };
}

listed! {
    /// The stage of a migration: the message that is in flight, and does not arrive before the fault.
    Stage {
        /// HELLO: the destination does not know the guest yet.
        Hello,
        /// READY: the destination has reserved everything.
        Ready,
        /// Pages, while the guest runs and writes.
        Rounds,
        /// FINAL: the guest is paused, its last pages are sent.
        Final,
        /// PREPARED: the destination could run the guest, and waits for GO.
        Prepared,
        /// GO: the source has committed itself.
        Go,
        /// RUNNING: the guest runs at the destination.
        Running,
        /// Nothing: the migration has succeeded.
        After,
    }
}

listed! {
    /// The fault.
    Fault {
        /// SIGKILL to the process that holds the guest.
        SourceKilled,
        /// SIGKILL to the process that receives it.
        DestinationKilled,
        /// Both at once.
        BothKilled,
        /// SIGSTOP for longer than a peer waits, then SIGCONT.
        SourceStopped,
        DestinationStopped,
        /// SIGTERM to the process that receives.
        DestinationTerminated,
        /// Every connection ends, and for a while no new one succeeds.
        LinkCut,
        /// For a while nothing arrives at the destination, and neither end notices.
        LinkStalledToDestination,
        /// For a while nothing arrives at the source.
        LinkStalledToSource,
        /// The control connection ends, the lanes do not.
        ControlLost,
        /// The lanes end, the control connection does not.
        LanesLost,
        /// The link is so slow that pages trickle.
        SlowLink,
        /// The destination cannot hold the guest.
        DestinationOutOfMemory,
        /// The destination's VMM cannot load the state.
        LoadFails,
        /// From now on no journal can be written.
        SourceJournalFails,
        DestinationJournalFails,
        /// The message is damaged.
        MessageCorrupt,
        /// The message claims to be longer than any message.
        MessageOversized,
        /// The message is of a kind that does not exist.
        MessageUnknown,
        /// The message arrives twice.
        MessageRepeated,
        /// The memory differs from the source's.
        DigestMismatch,
        /// A stranger sends GO.
        GoReplayed,
        /// `sterna cancel`.
        Cancelled,
        /// SIGTERM to the command `sterna migrate`.
        MigrateTerminated,
        /// The time limit of the migration passes.
        TimedOut,
    }
}

/// The required outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cell {
    /// The fault does not exist at this stage, for this reason.
    Never(&'static str),
    /// The guest runs on at the source, and can then be moved; `migrate` ends with this code.
    Stays(i32),
    /// The same, with 10 or 11: whether a page was sent before is a matter of chance.
    NotMoved,
    /// The guest stays as with 10, or moves: a matter of chance.
    Either,
    /// The guest runs at the destination and only there; `migrate` ends with 0.
    Moves,
    /// `migrate` may end with 12; then, without an operator, the guest runs on at the source.
    DoubtThenStays,
    /// The same, and the guest runs at the destination.
    DoubtThenMoves,
    /// The guest ended with its process. No host runs it or says that it does.
    Lost,
    /// The source's process is gone, and the destination holds the whole guest until an operator says that
    /// the source is fenced.
    Held,
    /// The destination ran the guest, and its process is gone. The source never runs the guest again.
    RanThere,
}

/// The row of a fault: a cell for each stage.
#[deny(clippy::wildcard_enum_match_arm, clippy::match_wildcard_for_single_variants)]
pub(crate) fn cells(fault: Fault) -> [Cell; Stage::ALL.len()] {
    const ENDED: Cell = Never("the source's process has ended, and the migration with it");
    const REFUSED: Cell = Stays(11);
    const FAILED: Cell = Stays(10);
    const ONCE: Cell = Never("it happens between FINAL and PREPARED only");
    const FIRST: Cell = Never("all of it is reserved before READY, or never");
    const NO_LANES: Cell = Never("there are no lanes then");
    match fault {
        // In the order of the stages: Hello, Ready, Rounds, Final, Prepared, Go, Running, After.
        Fault::SourceKilled => [Lost, Lost, Lost, Lost, Held, Held, DoubtThenMoves, ENDED],
        Fault::DestinationKilled => {
            [REFUSED, REFUSED, FAILED, FAILED, FAILED, DoubtThenStays, RanThere, RanThere]
        }
        Fault::BothKilled => [Lost, Lost, Lost, Lost, Lost, Lost, RanThere, RanThere],
        // The source wakes up and finds the messages that came meanwhile, or that the other side has given it
        // up.
        Fault::SourceStopped => {
            [NotMoved, NotMoved, FAILED, Either, Either, DoubtThenMoves, DoubtThenMoves, ENDED]
        }
        Fault::DestinationStopped => {
            [NotMoved, NotMoved, FAILED, FAILED, DoubtThenMoves, DoubtThenMoves, DoubtThenMoves, Moves]
        }
        Fault::DestinationTerminated => {
            [REFUSED, REFUSED, FAILED, FAILED, FAILED, DoubtThenStays, RanThere, RanThere]
        }
        Fault::LinkCut => [REFUSED, REFUSED, FAILED, FAILED, FAILED, Moves, Moves, Moves],
        Fault::LinkStalledToDestination => {
            [NotMoved, NotMoved, FAILED, FAILED, DoubtThenMoves, DoubtThenMoves, DoubtThenMoves, Moves]
        }
        Fault::LinkStalledToSource => {
            [NotMoved, NotMoved, FAILED, FAILED, FAILED, DoubtThenMoves, DoubtThenMoves, Moves]
        }
        Fault::ControlLost => [REFUSED, REFUSED, FAILED, FAILED, FAILED, Moves, Moves, ENDED],
        // Once FINAL is sent, all that the lanes carried has arrived.
        Fault::LanesLost => [NO_LANES, NO_LANES, FAILED, Moves, Moves, Moves, Moves, ENDED],
        Fault::SlowLink => [Moves, Moves, FAILED, Moves, Moves, Moves, Moves, ENDED],
        Fault::DestinationOutOfMemory => [REFUSED, FIRST, FIRST, FIRST, FIRST, FIRST, FIRST, FIRST],
        Fault::LoadFails => [ONCE, ONCE, ONCE, FAILED, ONCE, ONCE, ONCE, ONCE],
        Fault::SourceJournalFails => [FAILED, FAILED, FAILED, FAILED, FAILED, Moves, Moves, ENDED],
        Fault::DestinationJournalFails => {
            [REFUSED, FAILED, FAILED, FAILED, DoubtThenStays, DoubtThenStays, Moves, Moves]
        }
        Fault::MessageCorrupt | Fault::MessageOversized | Fault::MessageUnknown => {
            [REFUSED, REFUSED, FAILED, FAILED, FAILED, Moves, Moves, ENDED]
        }
        // A message that closes a round may close it twice.
        Fault::MessageRepeated => [NotMoved, FAILED, Moves, FAILED, Moves, Moves, Moves, ENDED],
        Fault::DigestMismatch => [ONCE, ONCE, ONCE, FAILED, ONCE, ONCE, ONCE, ONCE],
        Fault::GoReplayed => [Moves, Moves, Moves, Moves, Moves, Moves, Moves, Moves],
        Fault::Cancelled => [Stays(130), Stays(130), Stays(130), Stays(130), Stays(130), Moves, Moves, ENDED],
        Fault::MigrateTerminated => {
            [Stays(143), Stays(143), Stays(143), Stays(143), Stays(143), Moves, Moves, ENDED]
        }
        Fault::TimedOut => [
            Never("the time is looked at while the guest runs and pages are sent"),
            Never("the time is looked at while the guest runs and pages are sent"),
            FAILED,
            Never("the guest is paused: each step has a limit of its own, and the whole has none"),
            Never("the guest is paused: each step has a limit of its own, and the whole has none"),
            Never("the guest is given away: it is asked for ever"),
            Never("the guest is given away: it is asked for ever"),
            ENDED,
        ],
    }
}
