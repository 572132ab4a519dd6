//! Why a control channel fails.

use std::io;
use std::time::Duration;

use sterna_trust::{Right, TlsError};
use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

use crate::error_code::coded;
use crate::wire::WireError;

/// Errors of the control channel.
#[derive(Debug, Error, EnumDiscriminants)]
#[strum_discriminants(
    name(ControlErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum ControlError {
    /// The host's name has no address.
    #[error("cannot find the host {host}: {error}; is the name right?")]
    Resolve {
        /// The name.
        host: String,
        /// The resolver's error.
        error: io::Error,
    },
    /// No process answered at any of the host's addresses.
    #[error("cannot connect to {address}: {error}")]
    Connect {
        /// The last address tried.
        address: String,
        /// The kernel's error.
        error: io::Error,
    },
    /// The peer closed the connection.
    #[error("the other side closed the connection while {0} was awaited")]
    Closed(&'static str),
    /// The peer did not answer in time.
    #[error("no {awaited} from the other side within {} s", limit.as_secs())]
    Timeout {
        /// What was awaited.
        awaited: &'static str,
        /// The time limit.
        limit: Duration,
    },
    /// Nothing arrived from the peer, not even the keepalives that a live peer sends.
    #[error(
        "nothing was heard from the other side for {} s: its process hangs or was stopped, its host is down, or the link is cut",
        silence.as_secs()
    )]
    Silent {
        /// How long nothing arrived.
        silence: Duration,
    },
    /// The peer is alive but does not read.
    #[error("the other side has not taken {message} within {} s", limit.as_secs())]
    NotTaken {
        /// The message to be sent.
        message: &'static str,
        /// The time limit.
        limit: Duration,
    },
    /// This side has stopped waiting for the peer.
    #[error("this side has ended its wait for the other side")]
    Interrupted,
    /// The connection broke.
    #[error("the control connection broke: {0}")]
    Io(#[source] io::Error),
    /// The peer sent bytes that this version does not understand.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The peer sent a message out of turn.
    #[error("the other side sent {got} where {expected} was due")]
    Unexpected {
        /// The message that was due.
        expected: &'static str,
        /// The message that arrived.
        got: &'static str,
    },
    /// The peer has a key that this host does not trust.
    #[error(transparent)]
    KeyNotTrusted(TlsError),
    /// The peer does not trust this host's key.
    #[error(transparent)]
    KeyNotTrustedThere(TlsError),
    /// The peer is a trusted host, but another one than must answer.
    #[error(transparent)]
    OtherHost(TlsError),
    /// The peer is trusted, but not for this.
    #[error("{name} is trusted by this host, but may not {right}")]
    NotAllowed {
        /// The peer's name in the list of this host.
        name: String,
        /// What it may not do.
        right: Right,
    },
    /// The peer asks for TLS, and this side is to do without.
    #[error(
        "the other side asks for TLS, and this side is to do without: let the hosts trust each other (`sterna trust`), or let \
         both ends do without TLS"
    )]
    TlsRequired,
    /// This side asks for TLS, and the peer does without.
    #[error(
        "the other side does without TLS, which this side asks for: let the hosts trust each other (`sterna trust`), or let \
         both ends do without TLS"
    )]
    TlsMissing,
    /// A connection needs TLS, and this side has no keys.
    #[error("the connection needs TLS, and this side has no keys: only within a host is there none needed")]
    KeysNeeded,
    /// This host's key or its list of trusted hosts cannot be used.
    #[error(transparent)]
    Keys(TlsError),
    /// TLS failed.
    #[error(transparent)]
    Tls(TlsError),
}

coded!(ControlError, ControlErrorKind, "connection", via Wire);

impl From<TlsError> for ControlError {
    fn from(error: TlsError) -> Self {
        match error {
            TlsError::NotTrusted { .. } => Self::KeyNotTrusted(error),
            TlsError::NotTrustedThere { .. } => Self::KeyNotTrustedThere(error),
            TlsError::OtherHost { .. } => Self::OtherHost(error),
            TlsError::Keys(_) => Self::Keys(error),
            error => Self::Tls(error),
        }
    }
}
