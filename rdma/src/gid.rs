//! A port's addresses and the choice of one.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::sys::constants::{IBV_GID_TYPE_IB, IBV_GID_TYPE_ROCE_V1, IBV_GID_TYPE_ROCE_V2};

/// An entry of a port's GID table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gid {
    /// Its place in the table, which a queue pair names.
    pub index: u32,
    /// How packets from it look on the wire.
    pub kind: GidKind,
    /// The 128-bit address; on RoCE an IPv6 address, or an IPv4 address mapped into IPv6.
    pub address: [u8; 16],
}

impl Gid {
    /// The address as IP, an IPv4-mapped one as IPv4.
    pub fn ip(&self) -> IpAddr {
        Ipv6Addr::from(self.address).to_canonical()
    }

    /// The preference among entries when the choice is open; `None` for an entry that cannot be used on
    /// Ethernet.
    fn rank(&self) -> Option<u32> {
        match (self.kind, self.ip()) {
            (GidKind::RoceV2, IpAddr::V4(_)) => Some(0),
            (GidKind::RoceV2, IpAddr::V6(address)) if !address.is_unicast_link_local() => Some(1),
            (GidKind::RoceV2, IpAddr::V6(_)) => Some(2),
            (GidKind::RoceV1, _) => Some(3),
            (GidKind::InfiniBand | GidKind::Other(_), _) => None,
        }
    }
}

impl fmt::Display for Gid {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} ({}, index {})", self.ip(), self.kind, self.index)
    }
}

/// How packets from a GID look on the wire. Both ends of a connection need the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GidKind {
    /// InfiniBand.
    InfiniBand,
    /// RoCE version 1: InfiniBand in Ethernet frames, one broadcast domain.
    RoceV1,
    /// RoCE version 2: InfiniBand in UDP, routable.
    RoceV2,
    /// A kind that this version does not know, by number.
    Other(u32),
}

impl GidKind {
    pub(crate) fn from_raw(raw: u32) -> GidKind {
        match raw {
            IBV_GID_TYPE_IB => GidKind::InfiniBand,
            IBV_GID_TYPE_ROCE_V1 => GidKind::RoceV1,
            IBV_GID_TYPE_ROCE_V2 => GidKind::RoceV2,
            other => GidKind::Other(other),
        }
    }
}

impl fmt::Display for GidKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GidKind::InfiniBand => formatter.write_str("InfiniBand"),
            GidKind::RoceV1 => formatter.write_str("RoCE v1"),
            GidKind::RoceV2 => formatter.write_str("RoCE v2"),
            GidKind::Other(number) => write!(formatter, "GID kind {number}"),
        }
    }
}

/// Which of a port's GIDs to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GidChoice {
    /// On Ethernet the best of: RoCE v2 with an IPv4 address, RoCE v2 with a routable IPv6 address, RoCE v2
    /// link-local, RoCE v1; of equals the lowest index. On InfiniBand index 0.
    #[default]
    Auto,
    /// The entry of this address, RoCE v2 before v1.
    Address(IpAddr),
    /// The entry of this index.
    Index(u32),
}

/// No GID of a port fits a choice.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GidError {
    /// The table has no usable entry.
    #[error(
        "port {port} has no usable GID; give its network interface an IP address and bring it up (`ip address add`, \
         `ip link set up`)"
    )]
    None {
        /// The port.
        port: u8,
    },
    /// No entry has that address.
    #[error("port {port} has no GID for {address}; it has {available}")]
    NoSuchAddress {
        /// The port.
        port: u8,
        /// The address asked for.
        address: IpAddr,
        /// The port's addresses.
        available: String,
    },
    /// No entry has that index.
    #[error("port {port} has no GID at index {index}; it has {available}")]
    NoSuchIndex {
        /// The port.
        port: u8,
        /// The index asked for.
        index: u32,
        /// The port's entries.
        available: String,
    },
}

/// The choice on an Ethernet port.
pub(crate) fn choose_on_ethernet(port: u8, gids: &[Gid], choice: GidChoice) -> Result<Gid, GidError> {
    let best = |candidates: &mut dyn Iterator<Item = &Gid>| {
        candidates
            .filter_map(|gid| Some((gid.rank()?, gid.index, *gid)))
            .min_by_key(|&(rank, index, _)| (rank, index))
    };
    let found = match choice {
        GidChoice::Auto => best(&mut gids.iter()).ok_or(GidError::None { port })?,
        GidChoice::Address(address) => {
            let address = address.to_canonical();
            best(&mut gids.iter().filter(|gid| gid.ip() == address))
                .ok_or_else(|| GidError::NoSuchAddress { port, address, available: list(gids) })?
        }
        GidChoice::Index(index) => return at_index(port, gids, index),
    };
    Ok(found.2)
}

/// The choice on an InfiniBand port, where LIDs route the packets and the GID is a formality.
pub(crate) fn choose_on_infiniband(port: u8, gids: &[Gid], choice: GidChoice) -> Result<Gid, GidError> {
    match choice {
        GidChoice::Auto => at_index(port, gids, 0).map_err(|_| GidError::None { port }),
        GidChoice::Index(index) => at_index(port, gids, index),
        GidChoice::Address(address) => Err(GidError::NoSuchAddress {
            port,
            address,
            available: "an InfiniBand link, without IP addresses".to_owned(),
        }),
    }
}

fn at_index(port: u8, gids: &[Gid], index: u32) -> Result<Gid, GidError> {
    gids.iter().find(|gid| gid.index == index).copied().ok_or_else(|| GidError::NoSuchIndex {
        port,
        index,
        available: list(gids),
    })
}

fn list(gids: &[Gid]) -> String {
    if gids.is_empty() {
        return "none".to_owned();
    }
    gids.iter().map(Gid::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gid(index: u32, kind: GidKind, address: &str) -> Gid {
        let address = match address.parse::<IpAddr>().expect("an address written in this file") {
            IpAddr::V4(address) => address.to_ipv6_mapped(),
            IpAddr::V6(address) => address,
        };
        Gid { index, kind, address: address.octets() }
    }

    fn table() -> Vec<Gid> {
        vec![
            gid(0, GidKind::RoceV1, "fe80::1"),
            gid(1, GidKind::RoceV2, "fe80::1"),
            gid(2, GidKind::RoceV1, "10.0.0.7"),
            gid(3, GidKind::RoceV2, "2001:db8::7"),
            gid(4, GidKind::RoceV2, "10.0.0.7"),
            gid(5, GidKind::RoceV2, "10.0.1.7"),
        ]
    }

    fn automatic(gids: &[Gid]) -> Option<u32> {
        choose_on_ethernet(1, gids, GidChoice::Auto).ok().map(|gid| gid.index)
    }

    #[test]
    fn auto_goes_down_the_ranks() {
        let mut gids = table();
        for expected in [4, 5, 3, 1, 0, 2] {
            assert_eq!(automatic(&gids), Some(expected));
            gids.retain(|gid| gid.index != expected);
        }
        assert_eq!(automatic(&gids), None);
    }

    #[test]
    fn auto_refuses_kinds_it_does_not_know() {
        assert_eq!(
            automatic(&[gid(0, GidKind::Other(9), "10.0.0.7"), gid(1, GidKind::InfiniBand, "fe80::1")]),
            None
        );
    }

    #[test]
    fn an_address_is_found_in_its_newest_kind_and_either_notation() {
        for address in ["10.0.0.7", "::ffff:10.0.0.7"] {
            let address = address.parse().expect("an address written in this file");
            assert_eq!(
                choose_on_ethernet(1, &table(), GidChoice::Address(address)).map(|gid| gid.index),
                Ok(4)
            );
        }
    }

    #[test]
    fn an_address_that_is_not_there_names_those_that_are() {
        let address = "192.0.2.1".parse().expect("an address written in this file");
        let error =
            choose_on_ethernet(1, &table(), GidChoice::Address(address)).expect_err("it is not in the table");
        let text = error.to_string();
        assert!(text.contains("192.0.2.1") && text.contains("10.0.1.7 (RoCE v2, index 5)"), "{text}");
    }

    #[test]
    fn an_index_is_taken_at_its_word() {
        assert_eq!(choose_on_ethernet(1, &table(), GidChoice::Index(0)).map(|gid| gid.index), Ok(0));
        assert!(matches!(
            choose_on_ethernet(1, &table(), GidChoice::Index(6)),
            Err(GidError::NoSuchIndex { index: 6, .. })
        ));
    }

    #[test]
    fn infiniband_takes_the_first_entry() {
        let gids = [gid(0, GidKind::InfiniBand, "fe80::2"), gid(1, GidKind::InfiniBand, "fe80::3")];
        assert_eq!(choose_on_infiniband(1, &gids, GidChoice::Auto).map(|gid| gid.index), Ok(0));
        assert_eq!(choose_on_infiniband(1, &gids, GidChoice::Index(1)).map(|gid| gid.index), Ok(1));
        assert_eq!(choose_on_infiniband(1, &[], GidChoice::Auto), Err(GidError::None { port: 1 }));
    }
}
