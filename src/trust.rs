//! A host's key, the hosts that it trusts, and how connections between hosts are protected.
//!
//! [`Security`] belongs to the options of a migration, and to a receiver. With a [`TrustStore`] all
//! connections between hosts have TLS, by which both prove their keys; without one, only connections
//! within this host are made.

pub use sterna_trust::{Fingerprint, Peer, Rights, TrustError, TrustStore};

pub use crate::control::Security;
