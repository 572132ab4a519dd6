//! How pages travel.
//!
//! At the source a [`Transport`] has [`Lane`]s: each is driven by one worker, and pages of one stripe of RAM always take
//! the same lane, whose order makes the latest write of a page win. At the destination a [`LaneReceiver`] is where the lanes
//! end; what matters most about it is [`revoke`](LaneReceiver::revoke), after which nobody but this host can write to the guest.
//!
//! There are two kinds, and both move pages between guest RAM and guest RAM with no copy on the way that we make:
//! [`rdma`] writes them there one-sidedly, [`tcp`] sends them out of and reads them into guest RAM by vectored calls.

mod error;
#[cfg(test)]
pub(crate) mod faulty;
mod offer;
pub mod rdma;
mod remains;
pub mod tcp;

use std::fmt::Debug;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use error::TransportError;
pub use offer::{Offer, TransportChoice, land};
pub use remains::{Leak, Remains};

use crate::control::ControlChannel;
use crate::dirty::DirtyBitmap;
use crate::memory::PageRun;
use crate::wire::{ChunkKey, ChunkRange, LaneReady, Token};

/// The two ways for pages to travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TransportKind {
    /// TCP streams.
    Tcp,
    /// One-sided RDMA writes.
    Rdma,
}

/// The source's end of all lanes.
pub trait Transport: Send + Debug {
    /// Which kind it is.
    fn kind(&self) -> TransportKind;

    /// The device or the addresses used, for people.
    fn via(&self) -> String;

    /// What is expected of the registration of memory, if these pages are the last to be sent.
    fn registration_expected(&self, _dirty: &DirtyBitmap) -> RegistrationCost {
        RegistrationCost::default()
    }

    /// How long the lane that waited longest, in the round that was begun last, waited for memory to be registered.
    fn waited(&self) -> Duration {
        Duration::ZERO
    }

    /// Begins a round: the lanes, each for one worker, and what must run beside them while they send, if anything must.
    fn parts(&mut self) -> (&mut [Box<dyn Lane>], Option<&dyn Registration>);
}

/// How long registration of memory takes for a last round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegistrationCost {
    /// What can be [prepared](Registration::prepare) while the guest runs.
    pub ahead: Duration,
    /// What cannot, as not so much may be registered at once: the lanes wait for it while the guest is paused.
    pub paused: Duration,
}

/// Makes ready what lanes need, while they send: the registration of memory, which takes too long to wait for.
pub trait Registration: Sync {
    /// Works ahead of the lanes of a round in which these pages are sent, until [`end`](Self::end). Lanes that need what
    /// is not ready yet wait for it, and fail if this does.
    ///
    /// # Errors
    /// [`TransportError`]; the attempt is over.
    fn run(&self, dirty: &DirtyBitmap, control: &mut ControlChannel) -> Result<(), TransportError>;

    /// Makes ready, before a round and so without lanes, as much as there is room for of what sending these pages needs.
    ///
    /// # Errors
    /// [`TransportError`]; the attempt is over.
    fn prepare(&self, _dirty: &DirtyBitmap, _control: &mut ControlChannel) -> Result<(), TransportError> {
        Ok(())
    }

    /// The lanes of the round are done, or have failed.
    fn end(&self);
}

/// One ordered stream of pages.
pub trait Lane: Send + Debug {
    /// Sends these pages as they are when they leave, which may be later than the return of this call. Waits when too much
    /// is on its way.
    ///
    /// # Errors
    /// [`TransportError`]; the attempt is over.
    fn write(&mut self, run: PageRun) -> Result<(), TransportError>;

    /// Closes a round: returns once all that was written on this lane before is in the destination's RAM.
    ///
    /// # Errors
    /// [`TransportError`]; the attempt is over.
    fn fence(&mut self, round: u32) -> Result<(), TransportError>;

    /// How long it has waited so far for what a [`Registration`] had not ready: time in which the link was not to blame.
    fn waited(&self) -> Duration;
}

/// Where connections of lanes arrive: a socket that all attempts share, of which this brings those of one attempt.
pub trait LaneConnections {
    /// The next connection that bears the attempt's token, if one comes in time. Its preamble was read.
    ///
    /// # Errors
    /// Those of the socket.
    fn connection_within(&self, limit: Duration) -> io::Result<Option<LaneConnection>>;
}

/// A connection of one lane.
#[derive(Debug)]
pub struct LaneConnection {
    /// Which lane it says that it is.
    pub lane: u8,
    /// The connection.
    pub stream: TcpStream,
    /// The address of the source.
    pub from: SocketAddr,
}

/// The destination's end of all lanes.
pub trait LaneReceiver: Send + Debug {
    /// What the source must know to connect its lanes.
    fn ready(&self) -> LaneReady;

    /// The token that the connections of its lanes bear, where lanes are connections to the socket of this host's receiver.
    fn token(&self) -> Option<Token> {
        None
    }

    /// Waits for the lanes to connect, where they are such connections.
    ///
    /// # Errors
    /// [`TransportError`] if they do not in time.
    fn connect(&mut self, connections: &dyn LaneConnections) -> Result<(), TransportError>;

    /// Lets the source write to these chunks of RAM, which must lie in the guest.
    ///
    /// # Errors
    /// [`TransportError`] if a chunk is outside of RAM or cannot be registered, or if that would be more at once than
    /// [`ready`](Self::ready) said.
    fn register(&mut self, chunks: &[ChunkRange]) -> Result<Vec<ChunkKey>, TransportError>;

    /// Takes these chunks back: the source has nothing on its way to them and will ask anew before it has.
    ///
    /// # Errors
    /// [`TransportError`] if one is not registered, or if the device would not let go.
    fn release(&mut self, chunks: &[ChunkRange]) -> Result<(), TransportError>;

    /// Returns once the fences of `round` are seen on every lane.
    ///
    /// # Errors
    /// [`TransportError`] if a lane broke or the fences do not come in time.
    fn await_round(&mut self, round: u32) -> Result<(), TransportError>;

    /// How long [`revoke`](Self::revoke) is expected to take: what it took of as many lanes made for nothing else.
    fn revoke_time(&self) -> Duration;

    /// Takes every remote access to guest RAM away, in a time that does not grow with RAM. When it returns, nothing that the
    /// source or the network does can change a byte of it. What remains is released when there is time.
    ///
    /// # Errors
    /// [`TransportError`] if the device would not let go; then the guest must not run here.
    fn revoke(self: Box<Self>) -> Result<Box<dyn Remains>, TransportError>;
}

/// `1 lane`, `2 lanes`: a number of things, for people.
fn count(number: usize, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}
