//! What two queue pairs need to know of each other.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::gid::GidKind;
use crate::port::{LinkLayer, Mtu};

/// Queue pair numbers and packet sequence numbers have 24 bits on the wire.
pub(crate) const NUMBER_MAX: u32 = 0x00ff_ffff;

/// Queue pairs 0 and 1 of a port belong to subnet and general management.
const NUMBER_MIN: u32 = 2;

/// The last LID of one port; those above are multicast groups (InfiniBand specification, volume 1, 4.1.3).
const UNICAST_LID_MAX: u16 = 0xbfff;

/// One end of a connection. It travels over the authenticated control channel. `Debug` output hides the queue
/// pair's number and the sequence number, because both together let an attacker forge packets on an
/// unprotected network.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The queue pair's number, 24 bits.
    pub queue_pair_number: u32,
    /// The first packet sequence number that this end sends: 24 bits, random.
    pub packet_sequence_number: u32,
    /// The GID from which it sends.
    pub gid: [u8; 16],
    /// The GID's kind.
    pub gid_kind: GidKind,
    /// Its port's LID; 0 on Ethernet.
    pub lid: u16,
    /// Its port's active MTU in bytes.
    pub mtu_bytes: u16,
    /// The link layer of its port.
    pub link_layer: LinkLayer,
    /// How many reads it serves at once.
    pub reads_accepted: u8,
}

impl Endpoint {
    /// Checks a peer's endpoint against the local one before the device receives it; returns the MTU that
    /// both can use.
    pub(crate) fn check_peer(&self, peer: &Endpoint) -> Result<Mtu, EndpointError> {
        if !(NUMBER_MIN..=NUMBER_MAX).contains(&peer.queue_pair_number) {
            return Err(EndpointError::QueuePairNumber);
        }
        if peer.packet_sequence_number > NUMBER_MAX {
            return Err(EndpointError::PacketSequenceNumber);
        }
        let mtu = |endpoint: &Endpoint| {
            Mtu::from_bytes(endpoint.mtu_bytes).ok_or(EndpointError::Mtu { bytes: endpoint.mtu_bytes })
        };
        let mtu = mtu(self)?.min(mtu(peer)?);
        if self.link_layer != peer.link_layer {
            return Err(EndpointError::LinkLayer { ours: self.link_layer, theirs: peer.link_layer });
        }
        match self.link_layer {
            LinkLayer::InfiniBand if !(1..=UNICAST_LID_MAX).contains(&peer.lid) => {
                Err(EndpointError::Lid { lid: peer.lid })
            }
            LinkLayer::InfiniBand => Ok(mtu),
            LinkLayer::Ethernet => self.check_gid(peer).map(|()| mtu),
        }
    }

    fn check_gid(&self, peer: &Endpoint) -> Result<(), EndpointError> {
        let address = Ipv6Addr::from(peer.gid);
        let unusable = match address.to_canonical() {
            IpAddr::V4(address) => {
                address.is_unspecified() || address.is_multicast() || address.is_broadcast()
            }
            IpAddr::V6(address) => address.is_unspecified() || address.is_multicast(),
        };
        if unusable {
            return Err(EndpointError::Gid { address });
        }
        if self.gid_kind != peer.gid_kind {
            return Err(EndpointError::GidKind { ours: self.gid_kind, theirs: peer.gid_kind });
        }
        let ours = Ipv6Addr::from(self.gid);
        if ours.to_canonical().is_ipv4() != address.to_canonical().is_ipv4() {
            return Err(EndpointError::AddressFamily {
                ours: ours.to_canonical(),
                theirs: address.to_canonical(),
            });
        }
        Ok(())
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Endpoint")
            .field("gid", &Ipv6Addr::from(self.gid).to_canonical())
            .field("gid_kind", &self.gid_kind)
            .field("lid", &self.lid)
            .field("mtu_bytes", &self.mtu_bytes)
            .field("link_layer", &self.link_layer)
            .field("reads_accepted", &self.reads_accepted)
            .finish_non_exhaustive()
    }
}

/// Why no queue pair can connect to a peer's endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EndpointError {
    /// An ordinary queue pair cannot have this number.
    #[error("the peer's queue pair number is out of range")]
    QueuePairNumber,
    /// More than 24 bits.
    #[error("the peer's packet sequence number is out of range")]
    PacketSequenceNumber,
    /// Not one of the five sizes.
    #[error("an MTU of {bytes} bytes does not exist; 256, 512, 1024, 2048 and 4096 do")]
    Mtu {
        /// The size received.
        bytes: u16,
    },
    /// InfiniBand on one side, Ethernet on the other.
    #[error("our port is on {ours} and the peer's is on {theirs}; choose devices on the same network")]
    LinkLayer {
        /// The local link layer.
        ours: LinkLayer,
        /// The peer's link layer.
        theirs: LinkLayer,
    },
    /// The LID cannot belong to a port.
    #[error("the peer's LID {lid:#06x} is not that of a port; is a subnet manager running?")]
    Lid {
        /// The LID received.
        lid: u16,
    },
    /// The GID is not a host's address.
    #[error("the peer's GID {address} is not the address of a host")]
    Gid {
        /// The GID received.
        address: Ipv6Addr,
    },
    /// RoCE v1 on one side, v2 on the other.
    #[error("our GID is of {ours} and the peer's of {theirs}; choose GIDs of one kind on both hosts")]
    GidKind {
        /// The local kind.
        ours: GidKind,
        /// The peer's kind.
        theirs: GidKind,
    },
    /// IPv4 on one side, IPv6 on the other.
    #[error("our GID is {ours} and the peer's is {theirs}; choose addresses of one family on both hosts")]
    AddressFamily {
        /// The local address.
        ours: IpAddr,
        /// The peer's address.
        theirs: IpAddr,
    },
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn on_ethernet(last: u8) -> Endpoint {
        Endpoint {
            queue_pair_number: 0x11_2233,
            packet_sequence_number: 0xab_cdef,
            gid: Ipv4Addr::new(10, 0, 0, last).to_ipv6_mapped().octets(),
            gid_kind: GidKind::RoceV2,
            lid: 0,
            mtu_bytes: 4096,
            link_layer: LinkLayer::Ethernet,
            reads_accepted: 16,
        }
    }

    fn on_infiniband(lid: u16) -> Endpoint {
        let link_layer = LinkLayer::InfiniBand;
        Endpoint { lid, link_layer, gid: [0; 16], gid_kind: GidKind::InfiniBand, ..on_ethernet(1) }
    }

    fn check(change: impl FnOnce(&mut Endpoint)) -> Result<Mtu, EndpointError> {
        let mut peer = on_ethernet(2);
        change(&mut peer);
        on_ethernet(1).check_peer(&peer)
    }

    #[test]
    fn the_smaller_mtu_is_used() {
        assert_eq!(check(|_| {}), Ok(Mtu::Bytes4096));
        assert_eq!(check(|peer| peer.mtu_bytes = 1024), Ok(Mtu::Bytes1024));
    }

    #[test]
    fn numbers_beyond_the_wire_are_refused() {
        for number in [0, 1, 0x0100_0000, u32::MAX] {
            assert_eq!(check(|peer| peer.queue_pair_number = number), Err(EndpointError::QueuePairNumber));
        }
        assert!(check(|peer| peer.queue_pair_number = NUMBER_MAX).is_ok());
        assert_eq!(
            check(|peer| peer.packet_sequence_number = 0x0100_0000),
            Err(EndpointError::PacketSequenceNumber)
        );
        assert_eq!(check(|peer| peer.mtu_bytes = 1500), Err(EndpointError::Mtu { bytes: 1500 }));
    }

    #[test]
    fn addresses_of_no_host_are_refused() {
        let multicast = Ipv4Addr::new(224, 0, 0, 1).to_ipv6_mapped().octets();
        for gid in [[0; 16], [0xff; 16], multicast] {
            assert_eq!(check(|peer| peer.gid = gid), Err(EndpointError::Gid { address: gid.into() }));
        }
    }

    #[test]
    fn ends_that_cannot_hear_each_other_are_refused() {
        assert!(matches!(check(|peer| peer.gid_kind = GidKind::RoceV1), Err(EndpointError::GidKind { .. })));
        let v6 = "2001:db8::2".parse::<Ipv6Addr>().expect("an address written in this file");
        assert!(matches!(check(|peer| peer.gid = v6.octets()), Err(EndpointError::AddressFamily { .. })));
        assert!(matches!(check(|peer| *peer = on_infiniband(3)), Err(EndpointError::LinkLayer { .. })));
    }

    #[test]
    fn infiniband_needs_a_lid_and_no_gid() {
        assert_eq!(on_infiniband(1).check_peer(&on_infiniband(2)), Ok(Mtu::Bytes4096));
        for lid in [0, 0xc000, 0xffff] {
            assert_eq!(on_infiniband(1).check_peer(&on_infiniband(lid)), Err(EndpointError::Lid { lid }));
        }
    }

    #[test]
    fn the_numbers_that_let_packets_be_forged_do_not_show_in_logs() {
        let text = format!("{:?}", on_ethernet(1));
        assert!(!text.contains(&0x11_2233.to_string()) && !text.contains(&0xab_cdef.to_string()), "{text}");
        assert!(text.contains("10.0.0.1"), "{text}");
    }

    #[test]
    fn an_endpoint_survives_the_wire() {
        let text = serde_json::to_string(&on_ethernet(1)).expect("plain data serialises");
        assert_eq!(serde_json::from_str::<Endpoint>(&text).expect("what was serialised"), on_ethernet(1));
    }
}
