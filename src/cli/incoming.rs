//! A guest on its way to this host: the control socket answers only questions about its fate.

use std::os::unix::net::UnixStream;

use sterna::destination::{ArrivalPhase, PendingArrival, WordOutcome};

use super::exit::Exit;
use super::protocol::{Answer, Found, Request};
use super::server::{Asked, Serve, Served};
use super::socket::write_line;

/// Answers for the guest until it has arrived.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) pending: PendingArrival,
}

impl Serve for Incoming {
    fn serve(&self, asked: Asked, mut stream: UnixStream) -> Served {
        let answer = match asked {
            Ok(Request::Recover { run_destination, .. }) => self.found(run_destination).map(Answer::Found),
            Ok(Request::List) => self.phase(),
            _ => None,
        };
        let Some(answer) = answer else { return Served::NotYet(Box::new(asked), stream) };
        // The client may be gone.
        let _ = write_line(&mut stream, &answer);
        Served::Done
    }
}

impl Incoming {
    /// The phase of the arrival; `None` if the guest already belongs to this host.
    fn phase(&self) -> Option<Answer> {
        let phase = match self.pending.phase() {
            ArrivalPhase::Incoming => "arriving",
            ArrivalPhase::Ready => "ready",
            ArrivalPhase::Kept { .. } => "kept",
            ArrivalPhase::Running => return None,
        };
        Some(Answer::Arriving { phase: phase.into() })
    }

    /// Where the guest is; `None` if it already belongs to this host: its process is about to answer.
    fn found(&self, run_destination: bool) -> Option<Found> {
        let found = |exit, what: &str| Some(Found { exit, what: what.into() });
        match if run_destination { self.pending.source_is_fenced() } else { Ok(WordOutcome::NotKept) } {
            Ok(WordOutcome::Taken) => {
                return found(Exit::Done, "is run here, on the word that the other host is fenced");
            }
            Ok(WordOutcome::Contradicted) => {
                return found(
                    Exit::InDoubt,
                    "is ready to run here, and its source is not fenced, because it gave a sign of life: the word does not count",
                );
            }
            Ok(WordOutcome::NotKept) => {}
            Err(error) => {
                let what = format!("is ready to run here, and is not run without its lock: {error}");
                return found(Exit::InDoubt, &what);
            }
        }
        match self.pending.phase() {
            ArrivalPhase::Running => None,
            ArrivalPhase::Ready => found(
                Exit::InDoubt,
                "is ready to run here and paused at its source, which decides in a moment",
            ),
            kept @ ArrivalPhase::Kept { .. } => {
                let left = kept.left().unwrap_or_default().as_secs();
                let what = format!(
                    "is ready to run here, and its source is lost: it is held for {left} s more and given up then. If the \
                     source's host is fenced: --run-destination --other-host-is-fenced"
                );
                found(Exit::InDoubt, &what)
            }
            ArrivalPhase::Incoming if run_destination => found(
                Exit::Refused,
                "is on its way here, and its source is not lost: there is nothing to give a word for",
            ),
            ArrivalPhase::Incoming => found(Exit::Done, "is on its way here; it runs at the source"),
        }
    }
}
