//! A host's key, the hosts that it trusts, and TLS between them.
//!
//! Identity works as with ssh, without a certificate authority. Each host has one Ed25519 key, which is made
//! at first use, and a list of the hosts that it trusts by the fingerprints of their keys. TLS 1.3 carries
//! the keys as raw public keys (RFC 7250), in both directions: neither end completes a handshake with a key
//! that is not in its list.
//!
//! This crate knows nothing of guests and migrations. [`TrustStore`] has the files, [`connect`] and
//! [`accept`] make a [`TlsSession`] on a TCP connection, and [`TlsStream`] is such a connection with
//! blocking reads and writes.

mod buffer;
mod cipher;
mod fingerprint;
mod folder;
mod handshake;
mod key;
mod list;
mod peer;
mod rights;
mod session;
mod store;
mod stream;
mod tls_error;
mod trust_error;
mod verifier;

pub use fingerprint::Fingerprint;
pub use handshake::{accept, connect};
pub use key::HostKey;
pub use list::TrustedHosts;
pub use peer::Peer;
pub use rights::{Right, Rights};
pub use session::TlsSession;
pub use store::TrustStore;
pub use stream::TlsStream;
pub use tls_error::TlsError;
pub use trust_error::TrustError;
