use std::io;
use std::time::Duration;

use sterna_rdma::{CompletionStatus, PostError};
use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

use crate::control::ControlError;
use crate::error_code::coded;
use crate::memory::MemoryError;
use crate::panics::Panicked;
use crate::wire::WireError;

/// What can go wrong with the lanes.
#[derive(Debug, Error, EnumDiscriminants)]
#[strum_discriminants(
    name(TransportErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum TransportError {
    /// RDMA was asked for, but this host has no usable device.
    #[error("no RDMA device of this host reaches the peer ({reason})")]
    NoDevice {
        /// Why each device was passed over.
        reason: String,
    },
    /// The limit on locked memory is too low.
    #[error(
        "RDMA needs {} MiB of locked memory to be of use here, and may lock {:.1} MiB",
        needed_bytes.div_ceil(1 << 20),
        *limit_bytes as f64 / 1_048_576.0
    )]
    LockedMemory {
        /// The least useful amount.
        needed_bytes: u64,
        /// The limit of `RLIMIT_MEMLOCK`, or of the operator.
        limit_bytes: u64,
    },
    /// Too little memory is available to be pinned.
    #[error(
        "RDMA needs {} MiB of memory to be of use here, and {:.1} MiB may be pinned of what this host, or the control group, \
         has available",
        needed_bytes.div_ceil(1 << 20),
        *available_bytes as f64 / 1_048_576.0
    )]
    ScarceMemory {
        /// The least useful amount.
        needed_bytes: u64,
        /// What may be pinned: the memory of this process plus the available memory, less a reserve.
        available_bytes: u64,
    },
    /// The verbs layer failed.
    #[error(transparent)]
    Rdma(#[from] sterna_rdma::Error),
    /// A write was not completed.
    #[error("an RDMA write failed on lane {lane}: {error}")]
    Write {
        /// The lane.
        lane: usize,
        /// The completion's status.
        error: sterna_rdma::CompletionError,
    },
    /// The device did not accept a request.
    #[error("RDMA lane {lane} cannot post: {error}")]
    Post {
        /// The lane.
        lane: usize,
        /// The reason.
        error: sterna_rdma::PostError,
    },
    /// A connection of a TCP lane could not be made, or broke.
    #[error("TCP lane {lane} broke: {error}")]
    Stream {
        /// The lane.
        lane: usize,
        /// The kernel's answer.
        error: io::Error,
    },
    /// The peer closed a TCP lane.
    #[error("the other side closed TCP lane {lane}")]
    Closed {
        /// The lane.
        lane: usize,
    },
    /// The peer ended the attempt, for this reason.
    #[error("the other side gave up: {0}")]
    PeerGaveUp(String),
    /// A lane made no progress for too long.
    #[error("lane {lane} has made no progress for {} s: is the link up?", silence.as_secs_f64().ceil())]
    Stalled {
        /// The lane.
        lane: usize,
        /// How long.
        silence: Duration,
    },
    /// Memory to be sent was not registered at this host.
    #[error("guest memory was not registered for RDMA: {why}")]
    NotRegistered {
        /// The reason.
        why: &'static str,
    },
    /// The lanes failed at the peer.
    #[error("the lanes failed at the other side: {0}")]
    FailedThere(String),
    /// The peer's lanes differ from the agreed ones.
    #[error("the other side's lanes do not fit what was agreed: {0}")]
    Disagreement(String),
    /// The peer sent a message that this version does not understand.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The peer named pages that the guest does not have, or guest RAM is not usable.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The control channel failed while lanes were set up.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A thread of the lanes panicked.
    #[error("a defect of sterna ended a lane: {0}")]
    Panicked(String),
    /// No transport of this name is in this host's list.
    #[error("there is no transport named {scheme} here, but {known}")]
    Unknown {
        /// The name.
        scheme: String,
        /// The names in the list.
        known: String,
    },
    /// Every transport in the list was tried.
    #[error("no further transport is in the list")]
    NoneLeft,
    /// A transport from outside of this library failed.
    #[error("{scheme}: {error}")]
    Provider {
        /// Its name.
        scheme: String,
        /// Whether its device or its network failed, so that the next transport may succeed.
        may_fall_back: bool,
        /// What it says.
        error: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The system has no randomness.
    #[error("no random bytes from the system: {0}")]
    Random(getrandom::Error),
}

coded!(TransportError, TransportErrorKind, "transport", via Wire, Memory, Control);

impl TransportError {
    /// Whether the device or the network failed, so that other lanes may succeed. Never for a failure of
    /// memory protection or of the protocol: a wrong key or range is a defect or an attack, and another
    /// transport would hide it.
    #[must_use]
    pub fn may_fall_back(&self) -> bool {
        use CompletionStatus as Status;
        match self {
            Self::NoDevice { .. }
            | Self::LockedMemory { .. }
            | Self::ScarceMemory { .. }
            | Self::NotRegistered { .. }
            | Self::FailedThere(_)
            | Self::Stalled { .. }
            | Self::Unknown { .. }
            | Self::Post { error: PostError::Refused { .. }, .. } => true,
            Self::Provider { may_fall_back, .. } => *may_fall_back,
            Self::Rdma(error) => !matches!(
                error,
                sterna_rdma::Error::RegionOutOfRange { .. }
                    | sterna_rdma::Error::RegionInUse
                    | sterna_rdma::Error::AlreadyConnected
                    | sterna_rdma::Error::DifferentDevices
            ),
            Self::Write { error, .. } => matches!(
                error.status,
                Status::RetryExceeded
                    | Status::ReceiverNotReady
                    | Status::Flushed
                    | Status::ResponseTimeout
                    | Status::RemoteOperation
                    | Status::RemoteAborted
                    | Status::Fatal
                    | Status::General
            ),
            Self::Post { .. }
            | Self::Stream { .. }
            | Self::Closed { .. }
            | Self::PeerGaveUp(_)
            | Self::NoneLeft
            | Self::Disagreement(_)
            | Self::Wire(_)
            | Self::Memory(_)
            | Self::Control(_)
            | Self::Panicked(_)
            | Self::Random(_) => false,
        }
    }
}

impl From<Panicked> for TransportError {
    fn from(Panicked(text): Panicked) -> Self {
        Self::Panicked(text)
    }
}

#[cfg(test)]
mod tests {
    use sterna_rdma::CompletionError;

    use super::*;

    #[test]
    fn no_other_lanes_are_tried_after_what_memory_protection_stopped() {
        let may = |status| {
            TransportError::Write { lane: 0, error: CompletionError { status, vendor_code: 0 } }
                .may_fall_back()
        };
        for status in [CompletionStatus::RetryExceeded, CompletionStatus::Flushed, CompletionStatus::Fatal] {
            assert!(may(status), "{status}");
        }
        for status in [
            CompletionStatus::RemoteAccess,
            CompletionStatus::RemoteInvalidRequest,
            CompletionStatus::LocalProtection,
            CompletionStatus::LocalAccess,
            CompletionStatus::LocalLength,
            CompletionStatus::LocalOperation,
            CompletionStatus::BadResponse,
            CompletionStatus::Unknown(99),
        ] {
            assert!(!may(status), "{status}");
        }
        let foreign = TransportError::Post { lane: 0, error: PostError::ForeignRegion };
        assert!(!foreign.may_fall_back());
        assert!(!TransportError::Rdma(sterna_rdma::Error::RegionInUse).may_fall_back());
        assert!(!TransportError::Disagreement("a test".into()).may_fall_back());
    }
}
