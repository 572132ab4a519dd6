//! The list of trusted hosts, and its text.

use std::fmt;

use crate::fingerprint::Fingerprint;
use crate::peer::{Peer, is_name};
use crate::rights::Rights;
use crate::trust_error::TrustError;

/// The hosts that this host trusts. A host has several keys while it changes from one to another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustedHosts(Vec<Peer>);

impl TrustedHosts {
    /// The trusted keys, in the order of the list.
    pub fn iter(&self) -> impl Iterator<Item = &Peer> {
        self.0.iter()
    }

    /// The host with this key, if it is trusted.
    #[must_use]
    pub fn with_key(&self, fingerprint: Fingerprint) -> Option<&Peer> {
        self.0.iter().find(|peer| peer.fingerprint == fingerprint)
    }

    /// Whether two keys belong to one host: they are equal, or the list has both under one name.
    #[must_use]
    pub fn same_host(&self, one: Fingerprint, other: Fingerprint) -> bool {
        let name = |fingerprint| self.with_key(fingerprint).map(|peer| &peer.name);
        one == other || name(one).is_some_and(|one| Some(one) == name(other))
    }

    /// Adds a key of a host. Its rights become those of all keys of the host.
    pub(crate) fn add(&mut self, peer: Peer) -> Result<(), TrustError> {
        if !is_name(&peer.name) {
            return Err(TrustError::Name(peer.name.chars().take(80).collect()));
        }
        if let Some(other) = self.with_key(peer.fingerprint).filter(|other| other.name != peer.name) {
            return Err(TrustError::KeyOfOther {
                name: other.name.clone(),
                fingerprint: other.fingerprint.to_string(),
            });
        }
        for known in self.0.iter_mut().filter(|known| known.name == peer.name) {
            known.rights = peer.rights;
        }
        if self.with_key(peer.fingerprint).is_none() {
            if self.0.len() >= KEYS_MAX {
                return Err(TrustError::Full { max: KEYS_MAX });
            }
            self.0.push(peer);
        }
        Ok(())
    }

    /// Removes a host, or one of its keys; returns how many keys that were.
    pub(crate) fn remove(&mut self, name: &str, fingerprint: Option<Fingerprint>) -> usize {
        let before = self.0.len();
        self.0.retain(|peer| {
            peer.name != name || fingerprint.is_some_and(|fingerprint| fingerprint != peer.fingerprint)
        });
        before - self.0.len()
    }

    /// Reads the text of a list.
    pub(crate) fn read(text: &str) -> Result<Self, TrustError> {
        let mut hosts = Self::default();
        for (number, line) in (1..).zip(text.lines()) {
            let wrong = |why: String| TrustError::Line { number, why };
            let mut words = line.split_whitespace();
            let Some(name) = words.next().filter(|word| !word.starts_with('#')) else { continue };
            let (Some(fingerprint), Some(rights), None) = (words.next(), words.next(), words.next()) else {
                return Err(wrong("it is not a name, a fingerprint and rights".into()));
            };
            let fingerprint = fingerprint.parse().map_err(|error: TrustError| wrong(error.to_string()))?;
            let rights: Rights = rights.parse().map_err(|error: TrustError| wrong(error.to_string()))?;
            let name = name.to_owned();
            hosts.add(Peer { name, fingerprint, rights }).map_err(|error| wrong(error.to_string()))?;
        }
        Ok(hosts)
    }
}

/// The text of the file.
impl fmt::Display for TrustedHosts {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(HEAD)?;
        for Peer { name, fingerprint, rights } in &self.0 {
            writeln!(formatter, "{name} {fingerprint} {rights}")?;
        }
        Ok(())
    }
}

const HEAD: &str = "# The hosts that this host trusts: name, fingerprint, what each may do.\n";

/// The most keys in a list.
const KEYS_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str, key: u8, rights: &str) -> Peer {
        Peer { name: name.into(), fingerprint: Fingerprint([key; 32]), rights: rights.parse().unwrap() }
    }

    #[test]
    fn a_list_is_read_as_it_was_written() {
        let mut hosts = TrustedHosts::default();
        for peer in [peer("tern", 1, "send"), peer("10.0.0.2", 2, "receive,ask"), peer("tern", 3, "ask")] {
            hosts.add(peer).unwrap();
        }
        assert_eq!(TrustedHosts::read(&hosts.to_string()).unwrap(), hosts);
        assert_eq!(hosts.iter().filter(|peer| peer.rights.to_string() == "ask").count(), 2);
        assert_eq!(TrustedHosts::read("\n# none\n").unwrap(), TrustedHosts::default());
    }

    #[test]
    fn a_line_that_is_wrong_is_named_and_nothing_of_the_list_counts() {
        let good = format!("tern {} send\n", Fingerprint([1; 32]));
        for line in [
            "tern".to_owned(),
            "tern SHA256:x send".into(),
            format!("-tern {} send", Fingerprint([2; 32])),
            format!("gull {} all", Fingerprint([2; 32])),
            format!("gull {} send more", Fingerprint([2; 32])),
            format!("gull {} send", Fingerprint([1; 32])),
        ] {
            let error = TrustedHosts::read(&format!("{good}{line}\n")).unwrap_err();
            assert!(matches!(error, TrustError::Line { number: 2, .. }), "{line}: {error}");
        }
    }

    #[test]
    fn two_keys_under_one_name_are_one_host_and_a_key_has_one_name() {
        let mut hosts = TrustedHosts::default();
        for peer in [peer("tern", 1, "send"), peer("tern", 2, "send"), peer("gull", 3, "send")] {
            hosts.add(peer).unwrap();
        }
        let [old, new, other, unknown] = [1, 2, 3, 4].map(|key| Fingerprint([key; 32]));
        assert!(hosts.same_host(old, new) && hosts.same_host(unknown, unknown));
        assert!(!hosts.same_host(old, other) && !hosts.same_host(old, unknown));
        assert!(matches!(hosts.add(peer("gull", 1, "send")), Err(TrustError::KeyOfOther { .. })));
        assert_eq!((hosts.remove("tern", Some(old)), hosts.remove("tern", None)), (1, 1));
        assert_eq!(hosts.remove("tern", None), 0);
        assert_eq!(hosts.with_key(other).unwrap().name, "gull");
    }
}
