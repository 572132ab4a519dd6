//! Which connections need TLS, and whose keys they accept.

use std::net::SocketAddr;

use sterna_trust::{Fingerprint, TrustStore};

use super::error::ControlError;
use crate::wire::Protection;

/// How connections between hosts are protected. By default only connections within this host are made, and
/// those have no TLS.
#[derive(Clone, Debug, Default)]
pub struct Security(Mode);

#[derive(Clone, Debug, Default)]
enum Mode {
    #[default]
    LoopbackOnly,
    /// TLS, by which both hosts prove their keys; within this host only on request.
    Trusting {
        store: TrustStore,
        everywhere: bool,
    },
    Insecure,
}

impl Security {
    /// TLS on the control channel and on TCP lanes, with the key and the list of trusted hosts in these
    /// files. Connections within this host have none unless the peer asks for it.
    #[must_use]
    pub fn trusting(store: TrustStore) -> Self {
        Self(Mode::Trusting { store, everywhere: false })
    }

    /// The same, with TLS also within this host.
    #[must_use]
    pub fn trusting_everywhere(store: TrustStore) -> Self {
        Self(Mode::Trusting { store, everywhere: true })
    }

    /// No TLS: every host on the path can read and change guests, and every host that reaches a receiver can
    /// send a guest or take part in the handover of one.
    #[must_use]
    pub fn insecure() -> Self {
        Self(Mode::Insecure)
    }

    /// The files of the keys, if connections to other hosts have TLS.
    #[must_use]
    pub fn store(&self) -> Option<&TrustStore> {
        match &self.0 {
            Mode::Trusting { store, .. } => Some(store),
            Mode::LoopbackOnly | Mode::Insecure => None,
        }
    }

    /// Whether connections to other hosts are unprotected.
    #[must_use]
    pub fn is_insecure(&self) -> bool {
        matches!(self.0, Mode::Insecure)
    }

    /// The keys for a connection that this side opens; `None` if it is to have no TLS. An attempt that began
    /// with TLS goes on with TLS, whatever is allowed for others.
    pub(super) fn to_open(
        &self,
        peer: SocketAddr,
        expected: Option<Fingerprint>,
    ) -> Result<Option<&TrustStore>, ControlError> {
        match &self.0 {
            Mode::Trusting { store, everywhere } => {
                Ok((*everywhere || expected.is_some() || !is_loopback(peer)).then_some(store))
            }
            Mode::Insecure if expected.is_none() => Ok(None),
            Mode::LoopbackOnly if expected.is_none() && is_loopback(peer) => Ok(None),
            _ => Err(ControlError::KeysNeeded),
        }
    }

    /// The keys for a connection that the peer opens in this way; `None` if it is to have no TLS.
    pub(super) fn to_accept(
        &self,
        peer: SocketAddr,
        opened: Protection,
    ) -> Result<Option<&TrustStore>, ControlError> {
        match (&self.0, opened) {
            (Mode::Trusting { store, .. }, Protection::Tls) => Ok(Some(store)),
            (_, Protection::Tls) => Err(ControlError::TlsRequired),
            (Mode::Insecure, Protection::Plain) => Ok(None),
            (Mode::Trusting { everywhere: true, .. }, Protection::Plain) => Err(ControlError::TlsMissing),
            (_, Protection::Plain) if is_loopback(peer) => Ok(None),
            (_, Protection::Plain) => Err(ControlError::TlsMissing),
        }
    }

    /// Whether a host may take part in an attempt that this host began. Without TLS nothing tells hosts
    /// apart.
    pub(crate) fn belongs_to(&self, owner: Option<Fingerprint>, host: Option<Fingerprint>) -> bool {
        match (owner, host) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(owner), Some(host)) if owner == host => true,
            // A host has two keys while it changes from one to the other.
            (Some(owner), Some(host)) => self
                .store()
                .and_then(|store| store.trusted().ok())
                .is_some_and(|trusted| trusted.same_host(owner, host)),
        }
    }
}

fn is_loopback(peer: SocketAddr) -> bool {
    peer.ip().to_canonical().is_loopback()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const NEAR: [&str; 3] = ["127.0.0.1:1", "[::1]:1", "[::ffff:127.0.0.2]:1"];
    const FAR: [&str; 3] = ["192.0.2.1:1", "[2001:db8::1]:1", "[::ffff:192.0.2.1]:1"];

    fn store() -> TrustStore {
        TrustStore::at(Path::new("/nowhere"))
    }

    #[test]
    fn other_hosts_are_reached_by_tls_or_on_request_without() {
        let opens = |security: &Security, peer: &str, expected| {
            security.to_open(peer.parse().unwrap(), expected).map(|store| store.is_some())
        };
        let expected = Some(Fingerprint([1; 32]));
        let trusting = Security::trusting(store());
        for far in FAR {
            assert!(opens(&trusting, far, None).unwrap());
            assert!(!opens(&Security::insecure(), far, None).unwrap());
            assert!(matches!(opens(&Security::default(), far, None), Err(ControlError::KeysNeeded)));
        }
        for near in NEAR {
            assert!(!opens(&trusting, near, None).unwrap());
            assert!(!opens(&Security::default(), near, None).unwrap());
            assert!(opens(&Security::trusting_everywhere(store()), near, None).unwrap());
            assert!(opens(&trusting, near, expected).unwrap(), "it began with TLS");
            for without in [Security::default(), Security::insecure()] {
                assert!(matches!(opens(&without, near, expected), Err(ControlError::KeysNeeded)));
            }
        }
    }

    #[test]
    fn a_connection_without_tls_is_accepted_from_this_host_or_on_request() {
        let accepts = |security: &Security, peer: &str, opened| {
            security.to_accept(peer.parse().unwrap(), opened).map(|store| store.is_some())
        };
        let trusting = Security::trusting(store());
        for peer in NEAR.into_iter().chain(FAR) {
            let near = NEAR.contains(&peer);
            assert!(accepts(&trusting, peer, Protection::Tls).unwrap());
            for plain in [&trusting, &Security::default()] {
                match accepts(plain, peer, Protection::Plain) {
                    Ok(tls) => assert!(near && !tls, "{peer}"),
                    Err(error) => assert!(!near && matches!(error, ControlError::TlsMissing), "{peer}"),
                }
            }
            let everywhere = Security::trusting_everywhere(store());
            assert!(matches!(accepts(&everywhere, peer, Protection::Plain), Err(ControlError::TlsMissing)));
            assert!(!accepts(&Security::insecure(), peer, Protection::Plain).unwrap());
            let tls = accepts(&Security::insecure(), peer, Protection::Tls);
            assert!(matches!(tls, Err(ControlError::TlsRequired)));
        }
    }

    #[test]
    fn an_attempt_belongs_to_the_host_that_began_it() {
        let (one, other) = (Some(Fingerprint([1; 32])), Some(Fingerprint([2; 32])));
        let security = Security::trusting(store());
        assert!(security.belongs_to(one, one));
        assert!(!security.belongs_to(one, other) && !security.belongs_to(one, None));
        assert!(security.belongs_to(None, None) && security.belongs_to(None, one));
    }
}
