//! Why no TLS session is made, or why one ends.

use std::io;
use std::time::Duration;

use rustls::{AlertDescription, CertificateError, Error, PeerIncompatible};
use thiserror::Error as DeriveError;

use crate::fingerprint::Fingerprint;
use crate::trust_error::TrustError;

/// Why no TLS session is made, or why one ends.
#[derive(Debug, DeriveError)]
#[non_exhaustive]
pub enum TlsError {
    /// The peer's key is not in the list of this host.
    #[error(
        "the other side's key {fingerprint} is not trusted by this host: compare it with what `sterna trust show` prints \
         on that host, then `sterna trust add NAME {fingerprint}` on this one"
    )]
    NotTrusted {
        /// The peer's key.
        fingerprint: Fingerprint,
    },
    /// This host's key is not in the list of the peer.
    #[error(
        "the other side does not trust this host's key {fingerprint}: on that host, `sterna trust add NAME {fingerprint}`"
    )]
    NotTrustedThere {
        /// This host's key.
        fingerprint: Fingerprint,
    },
    /// The peer is trusted, but it is another host than the one that must answer.
    #[error("the other side is {name} with the key {fingerprint}, and not the host with the key {expected}")]
    OtherHost {
        /// The peer's name in the list.
        name: String,
        /// The peer's key.
        fingerprint: Fingerprint,
        /// The key of the host that must answer.
        expected: Fingerprint,
    },
    /// The peer presented no raw public key.
    #[error("the other side has shown no key, and this host knows others by their keys alone")]
    NoKey,
    /// The peer does not speak TLS 1.3.
    #[error("the other side does not speak TLS 1.3")]
    Version,
    /// The peer's bytes are not TLS.
    #[error("the other side sent bytes that are not TLS")]
    NotTls,
    /// The peer closed the connection in the middle.
    #[error("the other side closed the connection during the TLS handshake")]
    Closed,
    /// The peer did not complete the handshake in time.
    #[error("the other side did not complete the TLS handshake within {} s", limit.as_secs_f32())]
    Timeout {
        /// The time limit.
        limit: Duration,
    },
    /// A record was changed on its way, or is not the peer's.
    #[error("a TLS record was changed on its way")]
    Changed,
    /// An error has ended the session before.
    #[error("the TLS session is over")]
    Over,
    /// The connection failed.
    #[error("the connection failed during the TLS handshake: {0}")]
    Io(io::Error),
    /// This host's key or its list cannot be used.
    #[error("the keys of this host cannot be used: {0}")]
    Keys(String),
    /// Another failure of the protocol.
    #[error("TLS with the other side failed: {0}")]
    Protocol(String),
}

impl TlsError {
    /// The meaning of an error of the protocol, at a host with this key.
    pub(crate) fn of(error: Error, own: Fingerprint) -> Self {
        match error {
            Error::InvalidCertificate(CertificateError::Other(other)) => {
                match other.0.downcast_ref::<Refused>() {
                    Some(Refused(fingerprint)) => Self::NotTrusted { fingerprint: *fingerprint },
                    None => Self::Protocol(other.to_string()),
                }
            }
            Error::AlertReceived(AlertDescription::CertificateUnknown) => {
                Self::NotTrustedThere { fingerprint: own }
            }
            Error::NoCertificatesPresented
            | Error::PeerIncompatible(
                PeerIncompatible::IncorrectCertificateTypeExtension
                | PeerIncompatible::UnsolicitedCertificateTypeExtension,
            )
            | Error::AlertReceived(AlertDescription::CertificateRequired) => Self::NoKey,
            Error::PeerIncompatible(
                PeerIncompatible::SupportedVersionsExtensionRequired
                | PeerIncompatible::Tls13RequiredForQuic
                | PeerIncompatible::ServerDoesNotSupportTls12Or13
                | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
                | PeerIncompatible::Tls12NotOfferedOrEnabled
                | PeerIncompatible::Tls12NotOffered,
            )
            | Error::AlertReceived(AlertDescription::ProtocolVersion) => Self::Version,
            Error::InvalidMessage(_) => Self::NotTls,
            Error::DecryptError | Error::AlertReceived(AlertDescription::BadRecordMac) => Self::Changed,
            error => Self::Protocol(error.to_string()),
        }
    }
}

impl From<TrustError> for TlsError {
    fn from(error: TrustError) -> Self {
        Self::Keys(error.to_string())
    }
}

/// The verifier of a handshake refuses a key.
#[derive(Debug, DeriveError)]
#[error("the key {0} is not trusted")]
pub(crate) struct Refused(pub(crate) Fingerprint);
