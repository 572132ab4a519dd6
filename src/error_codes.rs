//! The list of all error codes. It uses every room; each room knows only its own codes.

use crate::error_code::ErrorCode;

impl ErrorCode {
    /// Every code with its meaning in a sentence; ordered by area, and within an area as in the enum.
    #[must_use]
    pub fn all() -> Vec<(Self, &'static str)> {
        [
            crate::wire::Refusal::codes(),
            crate::source::MigrationFailure::codes(),
            crate::source::StillInDoubt::codes(),
            crate::destination::ReceiveError::codes(),
            crate::session::SessionError::codes(),
            crate::image::SendFailure::codes(),
            crate::image::StoreError::codes(),
            crate::control::ControlError::codes(),
            crate::wire::WireError::codes(),
            crate::transport::TransportError::codes(),
            crate::saved_state::SavedStateError::codes(),
            crate::saved_state::SectionError::codes(),
            crate::handover::HandoverError::codes(),
            crate::handover::JournalError::codes(),
            crate::state::StartError::codes(),
            crate::state::StateError::codes(),
            crate::state::FolderError::codes(),
            crate::lock::LockError::codes(),
            crate::dirty::DirtyError::codes(),
            crate::memory::MemoryError::codes(),
            crate::sampling::SamplingError::codes(),
            crate::convergence::IfStuckError::codes(),
        ]
        .concat()
    }
}
