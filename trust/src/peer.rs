//! A host that this host trusts.

use crate::fingerprint::Fingerprint;
use crate::rights::{Right, Rights};

/// A key that this host trusts, and the name of its host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The host's name in the list of this host. It need not be a name on the network.
    pub name: String,
    /// The fingerprint of its key.
    pub fingerprint: Fingerprint,
    /// What the host may do.
    pub rights: Rights,
}

impl Peer {
    /// Whether the host may do this.
    #[must_use]
    pub fn may(&self, right: Right) -> bool {
        self.rights.include(right)
    }
}

/// Whether this can be the name of a host in the list.
pub(crate) fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
    (1..=NAME_MAX).contains(&name.len())
        && name.bytes().all(plain)
        && name.as_bytes()[0].is_ascii_alphanumeric()
}

/// The longest name of a host, in bytes: that of a name on the network.
const NAME_MAX: usize = 253;
