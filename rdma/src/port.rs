//! A device's port.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::gid::{self, Gid, GidChoice, GidError};
use crate::sys::constants::{
    IBV_LINK_LAYER_ETHERNET, IBV_MTU_256, IBV_MTU_512, IBV_MTU_1024, IBV_MTU_2048, IBV_MTU_4096,
    IBV_PORT_ACTIVE, IBV_PORT_ACTIVE_DEFER, IBV_PORT_ARMED, IBV_PORT_DOWN, IBV_PORT_INIT,
};
use crate::sys::structs::ibv_port_attr;

/// A port, as a query returned it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Port {
    /// Counted from 1.
    pub number: u8,
    /// Whether it can carry traffic.
    pub state: PortState,
    /// The link it is attached to.
    pub link_layer: LinkLayer,
    /// The largest packet payload that the link carries now.
    pub active_mtu: Mtu,
    /// The local identifier that an InfiniBand subnet manager gave it; 0 on Ethernet.
    pub lid: u16,
    /// The longest message of one work request.
    pub max_message_bytes: u32,
    /// The valid entries of its GID table.
    pub gids: Vec<Gid>,
}

impl Port {
    pub(crate) fn from_raw(number: u8, raw: &ibv_port_attr, gids: Vec<Gid>) -> Port {
        let link_layer = if raw.link_layer == IBV_LINK_LAYER_ETHERNET {
            LinkLayer::Ethernet
        } else {
            LinkLayer::InfiniBand
        };
        Port {
            number,
            state: PortState::from_raw(raw.state),
            link_layer,
            active_mtu: Mtu::from_raw(raw.active_mtu),
            lid: raw.lid,
            max_message_bytes: raw.max_msg_sz,
            gids,
        }
    }

    /// Whether it can carry traffic.
    pub fn is_active(&self) -> bool {
        matches!(self.state, PortState::Active | PortState::ActiveDefer)
    }

    /// The GID that a queue pair on this port sends from.
    ///
    /// # Errors
    /// [`GidError`] names the choice and the available entries.
    pub fn choose_gid(&self, choice: GidChoice) -> Result<Gid, GidError> {
        match self.link_layer {
            LinkLayer::Ethernet => gid::choose_on_ethernet(self.number, &self.gids, choice),
            LinkLayer::InfiniBand => gid::choose_on_infiniband(self.number, &self.gids, choice),
        }
    }
}

/// The state of a port (`enum ibv_port_state`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PortState {
    /// No link.
    Down,
    /// Link, but not configured: on InfiniBand a subnet manager is missing.
    Initializing,
    /// Configured, waiting for its neighbour.
    Armed,
    /// Carries traffic.
    Active,
    /// Carries traffic, with an error being handled.
    ActiveDefer,
    /// Another state, by number.
    Other(u32),
}

impl PortState {
    fn from_raw(raw: u32) -> PortState {
        match raw {
            IBV_PORT_DOWN => PortState::Down,
            IBV_PORT_INIT => PortState::Initializing,
            IBV_PORT_ARMED => PortState::Armed,
            IBV_PORT_ACTIVE => PortState::Active,
            IBV_PORT_ACTIVE_DEFER => PortState::ActiveDefer,
            other => PortState::Other(other),
        }
    }
}

/// The link that a port is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LinkLayer {
    /// An InfiniBand fabric: peers are found by LID.
    InfiniBand,
    /// Ethernet (RoCE): peers are found by GID.
    Ethernet,
}

impl fmt::Display for LinkLayer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            LinkLayer::InfiniBand => "InfiniBand",
            LinkLayer::Ethernet => "Ethernet",
        })
    }
}

/// The payload of a packet; the five sizes of the InfiniBand specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mtu {
    /// 256 bytes.
    Bytes256,
    /// 512 bytes.
    Bytes512,
    /// 1024 bytes.
    Bytes1024,
    /// 2048 bytes.
    Bytes2048,
    /// 4096 bytes.
    Bytes4096,
}

impl Mtu {
    const ALL: [Mtu; 5] = [Mtu::Bytes256, Mtu::Bytes512, Mtu::Bytes1024, Mtu::Bytes2048, Mtu::Bytes4096];

    /// The size in bytes.
    pub fn bytes(self) -> u16 {
        match self {
            Mtu::Bytes256 => 256,
            Mtu::Bytes512 => 512,
            Mtu::Bytes1024 => 1024,
            Mtu::Bytes2048 => 2048,
            Mtu::Bytes4096 => 4096,
        }
    }

    /// The MTU of exactly that many bytes.
    pub fn from_bytes(bytes: u16) -> Option<Mtu> {
        Mtu::ALL.into_iter().find(|mtu| mtu.bytes() == bytes)
    }

    pub(crate) fn to_raw(self) -> u32 {
        match self {
            Mtu::Bytes256 => IBV_MTU_256,
            Mtu::Bytes512 => IBV_MTU_512,
            Mtu::Bytes1024 => IBV_MTU_1024,
            Mtu::Bytes2048 => IBV_MTU_2048,
            Mtu::Bytes4096 => IBV_MTU_4096,
        }
    }

    /// A value outside the enumeration counts as the nearest known size: the two ends agree on the smaller.
    fn from_raw(raw: u32) -> Mtu {
        match raw {
            0 | IBV_MTU_256 => Mtu::Bytes256,
            IBV_MTU_512 => Mtu::Bytes512,
            IBV_MTU_1024 => Mtu::Bytes1024,
            IBV_MTU_2048 => Mtu::Bytes2048,
            _ => Mtu::Bytes4096,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_mtu_survives_both_of_its_notations() {
        for mtu in Mtu::ALL {
            assert_eq!(Mtu::from_bytes(mtu.bytes()), Some(mtu));
            assert_eq!(Mtu::from_raw(mtu.to_raw()), mtu);
        }
        assert_eq!(Mtu::from_bytes(1500), None);
    }

    #[test]
    fn a_larger_mtu_than_is_known_counts_as_the_largest_known() {
        assert_eq!(Mtu::from_raw(6), Mtu::Bytes4096);
    }
}
