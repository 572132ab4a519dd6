//! The records of one attempt at one host, which the handover's state machine asks for.

use std::time::Duration;

use crate::handover::{Record, RecordKind};
use crate::state::{RecordWriter, StateError};

/// Writes the records of an attempt, and keeps the error of the first that failed.
#[derive(Debug)]
pub(crate) struct AttemptRecords {
    writer: RecordWriter,
    unrecorded: Option<StateError>,
}

impl AttemptRecords {
    pub(crate) fn new(writer: RecordWriter) -> Self {
        Self { writer, unrecorded: None }
    }

    /// Makes a record durable. Returns the event for the state machine: `recorded`, or `not_recorded` after
    /// an error.
    pub(crate) fn write<Event>(
        &mut self,
        record: Record,
        recorded: fn(RecordKind) -> Event,
        not_recorded: fn(RecordKind) -> Event,
    ) -> Event {
        let mark = record.mark;
        match self.writer.append(record) {
            Ok(()) => recorded(mark),
            Err(error) => {
                tracing::error!("{mark} is not recorded: {error}");
                // The first error is the cause; later ones follow from it.
                self.unrecorded.get_or_insert(error);
                not_recorded(mark)
            }
        }
    }

    /// How long a record takes.
    pub(crate) fn record_time(&self) -> Duration {
        self.writer.record_time()
    }

    /// Whether no record has failed since the error was last taken.
    pub(crate) fn none_failed(&self) -> bool {
        self.unrecorded.is_none()
    }

    /// Why a record could not be written.
    pub(crate) fn take_unrecorded(&mut self) -> Option<StateError> {
        self.unrecorded.take()
    }
}
