//! After a failure in any step: the guest runs on at the source if the source still owns it.

use super::doubt::Doubt;
use super::error::{GuestIs, MigrationError, MigrationFailure};
use super::migration::{Connected, Migration, let_go};
use super::throttle::throttle;
use crate::guest::RunOutcome;
use crate::handover::{SourceAction, SourceEvent, SourceState};
use crate::panics::{Panicked, caught};
use crate::wire::{AttemptId, Message};

/// A step's effects on the guest, to be undone.
#[derive(Clone, Copy, Default)]
pub(super) struct Undo {
    pub(super) throttle_percent: u8,
    /// `pause` was called, with whatever result.
    pub(super) may_be_paused: bool,
}

impl Connected {
    /// Ends the attempt, and resumes the guest if the handover decides so.
    pub(super) fn give_up(
        mut self,
        migration: Migration<'_>,
        undo: Undo,
        cause: MigrationFailure,
    ) -> MigrationError {
        let cancel = &migration.options.cancel;
        let cause = cause.explained(|cause| cancel.explain(cause));
        // Before anything else, because finding the cause may take a moment.
        if undo.throttle_percent > 0 {
            throttle(migration, 0, None);
        }
        let (guest, cause) = self.take_back(migration, undo, cause);
        // A failure of the log makes nothing worse, and the cause matters more.
        match caught(|| self.log.stop()) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!("the dirty log stays on: {error}"),
            Err(Panicked(text)) => tracing::error!("the dirty log panicked when it was stopped: {text}"),
        }
        let Self { mut link, log, handover } = self;
        let (cause, doubt) = if guest == GuestIs::InDoubt {
            (cause, Some(Box::new(Doubt::after_failure(handover))))
        } else {
            cancel.reopen();
            let explained = caught(|| {
                let cause = cause.explained(|cause| link.explain(cause));
                if !matches!(cause, MigrationFailure::DestinationFailed(_)) {
                    // The destination may be gone, as this message reports.
                    let _ = link.control.send(&Message::Abort(link.attempt_id, cause.to_string()));
                }
                cause
            });
            (explained.unwrap_or_else(MigrationFailure::from), None)
        };
        let_go((link, log));
        MigrationError { guest, refused: false, cause, doubt }
    }

    /// Carries out the handover's decision on this failure.
    fn take_back(
        &mut self,
        migration: Migration<'_>,
        undo: Undo,
        cause: MigrationFailure,
    ) -> (GuestIs, MigrationFailure) {
        let event = event_of(&cause, self.link.attempt_id);
        let action = caught(|| match self.handover.state() {
            SourceState::Kept => Ok(SourceAction::Resume),
            _ => self.handover.on(event),
        });
        match action {
            Ok(Ok(SourceAction::Resume)) => match self.handover.take_lock() {
                Ok(()) => (resume(migration, undo), cause),
                Err(error) => {
                    (GuestIs::InDoubt, MigrationFailure::LockLost { cause: cause.to_string(), error })
                }
            },
            // A guest that was never paused has not been given away, whatever failed afterwards.
            Ok(Err(_)) | Err(_) if !undo.may_be_paused => (GuestIs::RunningAtSource, cause),
            _ => (GuestIs::InDoubt, cause),
        }
    }
}

fn resume(migration: Migration<'_>, undo: Undo) -> GuestIs {
    if !undo.may_be_paused {
        return GuestIs::RunningAtSource;
    }
    let why = match caught(|| migration.guest.resume()) {
        Ok(Ok(RunOutcome::Running)) => return GuestIs::RunningAtSource,
        Ok(Ok(RunOutcome::Unknown { reason })) => {
            tracing::error!("the VMM does not say whether the guest runs on: {reason}");
            return GuestIs::UnknownAtSource;
        }
        Ok(Err(error)) => error.to_string(),
        Err(Panicked(text)) => format!("the VMM panicked: {text}"),
    };
    tracing::error!("the guest could not be resumed: {why}");
    GuestIs::PausedAtSource
}

/// The handover's event for a failure.
pub(super) fn event_of(cause: &MigrationFailure, attempt_id: AttemptId) -> SourceEvent {
    match cause {
        MigrationFailure::DestinationFailed(_) => SourceEvent::Refused(attempt_id),
        _ => SourceEvent::Failed,
    }
}
