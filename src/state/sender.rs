//! The host that sent a guest, as far as its records tell hosts apart.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use sterna_trust::Fingerprint;

use crate::handover::{Journal, RecordKind, Side};

/// A sender of guests: its key, or without TLS its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sender {
    Key(Fingerprint),
    /// IPv6 addresses of one network of 64 bits count as one.
    Address(IpAddr),
    Unknown,
}

impl Sender {
    /// The sender at the other end of a connection.
    pub(super) fn of(address: Option<IpAddr>, identity: Option<Fingerprint>) -> Self {
        match (identity, address.map(|address| address.to_canonical())) {
            (Some(identity), _) => Self::Key(identity),
            (None, Some(IpAddr::V6(address))) => {
                Self::Address(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into())
            }
            (None, Some(address)) => Self::Address(address),
            (None, None) => Self::Unknown,
        }
    }

    /// The last sender of a guest that never ran on this host, by records which say no more than that.
    pub(super) fn that_left(journal: &Journal) -> Option<Self> {
        let never_ran = journal.records().iter().all(|record| {
            record.side == Side::Destination
                && matches!(record.mark, RecordKind::Prepared | RecordKind::Refused)
        });
        let last = journal.last().filter(|_| never_ran)?;
        let address = last.peer.parse::<SocketAddr>().ok().map(|address| address.ip());
        Some(Self::of(address, last.identity))
    }
}
