//! What a way for pages to travel has to provide at either host.

use std::fmt::Debug;

use super::error::TransportError;
use super::lane::Transport;
use super::receiver::LaneReceiver;
use crate::control::ControlChannel;
use crate::memory::GuestRam;
use crate::wire::LaneOffer;

/// A way for pages to travel: makes the ends of its lanes at either host.
///
/// The source [offers](Self::offer); what the offer says goes to the destination in HELLO. The provider of the same name
/// [receives](Self::receive) it there, and what its [`ready`](LaneReceiver::ready) says comes back in READY, with which the
/// offer [connects](SourceOffer::connect). The engine reads none of these bytes.
pub trait TransportProvider: Debug + Send + Sync {
    /// Its name in HELLO, in reports and on the command line: lower-case letters, digits and `-`, at most
    /// [`SCHEME_MAX`](crate::wire::SCHEME_MAX) bytes.
    fn scheme(&self) -> &str;

    /// Makes the source's ends of the lanes, before the destination has been asked.
    ///
    /// # Errors
    /// [`TransportError`] if this host cannot reach the peer by this transport. The source takes the next in its list.
    fn offer(&self, source: &Source<'_>) -> Result<Box<dyn SourceOffer>, TransportError>;

    /// Makes the destination's ends for the lanes that a source offers. The body comes from a peer: check every value in it.
    ///
    /// # Errors
    /// [`TransportError`] if this host cannot receive by this transport. The source takes the next in its list.
    fn receive(
        &self,
        offer: &LaneOffer,
        destination: &Destination<'_>,
    ) -> Result<Box<dyn LaneReceiver>, TransportError>;

    /// Whether a device pins the memory that it writes to. A file can be received into such memory only where its file system
    /// is in memory, with its holes made.
    fn pins_memory(&self) -> bool {
        false
    }
}

/// What an offer is made from.
#[derive(Clone, Copy, Debug)]
pub struct Source<'attempt> {
    /// The connection to the destination: the addresses of both hosts, and whether the peer lives.
    pub control: &'attempt ControlChannel,
    /// What the lanes send from.
    pub ram: &'attempt GuestRam,
    /// How many lanes are wanted, at most 64; `None`: as many as suit the transport.
    pub lanes: Option<u8>,
    /// Whether this transport is the only one in the list, so that what is merely not worthwhile is better than nothing.
    pub by_name: bool,
}

/// What the destination's ends are made from.
#[derive(Clone, Copy, Debug)]
pub struct Destination<'attempt> {
    /// The connection to the source: the addresses of both hosts, and whether the peer lives.
    pub control: &'attempt ControlChannel,
    /// What the lanes write to.
    pub ram: &'attempt GuestRam,
}

/// The source's ends of the lanes before the destination has answered.
pub trait SourceOffer: Debug + Send {
    /// How many lanes there are, from 1 to 64.
    fn lanes(&self) -> u8;

    /// What the destination's provider must know: at most [`LANE_BODY_MAX`](crate::wire::LANE_BODY_MAX) bytes.
    ///
    /// # Errors
    /// [`TransportError`] if it cannot be encoded.
    fn body(&self) -> Result<Vec<u8>, TransportError>;

    /// Why this transport was chosen where there are others in the list, for people.
    fn reason(&self) -> String {
        "the first of the list that can be had".into()
    }

    /// Connects the lanes to what the destination has made for them and described in `ready`, which comes from a peer.
    ///
    /// # Errors
    /// [`TransportError`] if they do not connect, or if the answer does not fit the offer. If it
    /// [may fall back](TransportError::may_fall_back), the source takes the next transport in its list.
    fn connect(
        self: Box<Self>,
        ready: &[u8],
        control: &ControlChannel,
        ram: &GuestRam,
    ) -> Result<Box<dyn Transport>, TransportError>;
}
