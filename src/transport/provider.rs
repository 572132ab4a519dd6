//! The interface of a transport at either host.

use std::fmt::Debug;

use super::error::TransportError;
use super::lane::Transport;
use super::receiver::LaneReceiver;
use crate::control::ControlChannel;
use crate::memory::GuestRam;
use crate::wire::LaneOffer;

/// A transport of pages: makes the ends of its lanes at either host.
///
/// The source [offers](Self::offer); the offer goes to the destination in HELLO. The destination's provider
/// of the same name [receives](Self::receive) it, and its [`ready`](LaneReceiver::ready) returns in READY,
/// with which the offer [connects](SourceOffer::connect). The engine reads none of these bytes.
pub trait TransportProvider: Debug + Send + Sync {
    /// Its name in HELLO, in reports and on the command line: lower-case letters, digits and `-`, at most
    /// [`SCHEME_MAX`](crate::wire::SCHEME_MAX) bytes.
    fn scheme(&self) -> &str;

    /// Makes the source's ends of the lanes, before the destination is asked.
    ///
    /// # Errors
    /// [`TransportError`] if this host cannot reach the peer by this transport. The source then tries the
    /// next in its list.
    fn offer(&self, source: &Source<'_>) -> Result<Box<dyn SourceOffer>, TransportError>;

    /// Makes the destination's ends for the lanes that a source offers. The body comes from a peer: check
    /// every value in it.
    ///
    /// # Errors
    /// [`TransportError`] if this host cannot receive by this transport. The source then tries the next in
    /// its list.
    fn receive(
        &self,
        offer: &LaneOffer,
        destination: &Destination<'_>,
    ) -> Result<Box<dyn LaneReceiver>, TransportError>;

    /// Whether a device pins the memory that it writes to. A file can be received into such memory only if
    /// its file system is in memory and its holes are allocated.
    fn pins_memory(&self) -> bool {
        false
    }
}

/// The input of an offer.
#[derive(Clone, Copy, Debug)]
pub struct Source<'attempt> {
    /// The connection to the destination: the addresses of both hosts, and whether the peer lives.
    pub control: &'attempt ControlChannel,
    /// The RAM that the lanes send from.
    pub ram: &'attempt GuestRam,
    /// The number of lanes asked for, at most 64; `None`: as many as suit the transport.
    pub lanes: Option<u8>,
    /// Whether this transport is the only one in the list: then even a poor configuration is better than
    /// none.
    pub by_name: bool,
}

/// The input of the destination's ends.
#[derive(Clone, Copy, Debug)]
pub struct Destination<'attempt> {
    /// The connection to the source: the addresses of both hosts, and whether the peer lives.
    pub control: &'attempt ControlChannel,
    /// The RAM that the lanes write to.
    pub ram: &'attempt GuestRam,
}

/// The source's ends of the lanes before the destination has answered.
pub trait SourceOffer: Debug + Send {
    /// The number of lanes, from 1 to 64.
    fn lanes(&self) -> u8;

    /// The parameters for the destination's provider: at most [`LANE_BODY_MAX`](crate::wire::LANE_BODY_MAX)
    /// bytes.
    ///
    /// # Errors
    /// [`TransportError`] if it cannot be encoded.
    fn body(&self) -> Result<Vec<u8>, TransportError>;

    /// Why this transport was chosen from the list, for people.
    fn reason(&self) -> String {
        "the first of the list that can be had".into()
    }

    /// Connects the lanes to the destination's ends as described in `ready`, which comes from a peer.
    ///
    /// # Errors
    /// [`TransportError`] if they do not connect, or if the answer does not fit the offer. If it [may fall
    /// back](TransportError::may_fall_back), the source tries the next transport in its list.
    fn connect(
        self: Box<Self>,
        ready: &[u8],
        control: &ControlChannel,
        ram: &GuestRam,
    ) -> Result<Box<dyn Transport>, TransportError>;
}
