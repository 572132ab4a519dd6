//! The messages between the two ends: in HELLO, in READY, and beside the lanes. The engine carries them
//! unread.

use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sterna_rdma::{Endpoint, RemoteKey};

use crate::transport::error::TransportError;
use crate::wire::{LANES_MAX, WireError};

/// The most chunks in one request.
pub const CHUNKS_MAX: usize = 1024;

/// In HELLO: the source's ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offered {
    /// The source's queue pairs, one a lane.
    pub endpoints: Vec<Endpoint>,
    /// Whether a device without the address of the control channel is enough: RDMA was asked for by name.
    pub any_device: bool,
}

/// In READY: the destination's ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// The destination's queue pairs, connected to those offered, in the same order.
    pub endpoints: Vec<Endpoint>,
    /// How much RAM the destination can have registered at once, in bytes; `None`: all of RAM.
    pub pin_max_bytes: Option<u64>,
}

/// The source's requests beside the lanes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Register these chunks of RAM for writing. Answered with [`Keys`].
    Register(Vec<ChunkRange>),
    /// No write to these chunks is in flight, and none will follow until they are registered anew. Not
    /// answered.
    Release(Vec<ChunkRange>),
}

/// The answer to [`Request::Register`]: the keys for the chunks, in the order asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keys(pub Vec<ChunkKey>);

/// A part of a RAM region that is registered as a whole. In the order of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChunkRange {
    /// Index of the region.
    pub region: u16,
    /// First page, counted from the region's start.
    pub first_page: u64,
    /// How many pages.
    pub pages: u64,
}

/// The address and the key for writing into a chunk. `Debug` output hides both.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkKey {
    /// The address of its first byte at the destination.
    pub address: u64,
    /// The key of its memory region.
    pub key: RemoteKey,
}

impl fmt::Debug for ChunkKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ChunkKey(…)")
    }
}

impl Offered {
    /// The bytes.
    ///
    /// # Errors
    /// [`TransportError::Wire`] without lanes, or with too many.
    pub fn encode(&self) -> Result<Vec<u8>, TransportError> {
        check_lanes(&self.endpoints)?;
        to_bytes(OFFERED, self)
    }

    /// Reads the bytes, for as many lanes as the offer has.
    ///
    /// # Errors
    /// [`TransportError::Wire`] if the bytes are invalid.
    pub fn decode(body: &[u8], lanes: u8) -> Result<Self, TransportError> {
        let offered: Self = from_bytes(OFFERED, body)?;
        if offered.endpoints.len() != usize::from(lanes) {
            return Err(WireError::Malformed(OFFERED).into());
        }
        check_lanes(&offered.endpoints)?;
        Ok(offered)
    }
}

impl Ready {
    /// The bytes.
    ///
    /// # Errors
    /// [`TransportError::Wire`] without lanes, or with too many.
    pub fn encode(&self) -> Result<Vec<u8>, TransportError> {
        check_lanes(&self.endpoints)?;
        to_bytes(READY, self)
    }

    /// Reads the bytes.
    ///
    /// # Errors
    /// [`TransportError::Wire`] if the bytes are invalid.
    pub fn decode(body: &[u8]) -> Result<Self, TransportError> {
        let ready: Self = from_bytes(READY, body)?;
        check_lanes(&ready.endpoints)?;
        Ok(ready)
    }
}

impl Request {
    /// The bytes.
    ///
    /// # Errors
    /// [`TransportError::Wire`] for more than [`CHUNKS_MAX`] chunks.
    pub fn encode(&self) -> Result<Vec<u8>, TransportError> {
        self.check()?;
        to_bytes(REQUEST, self)
    }

    /// Reads the bytes. The receiver checks whether the chunks lie in RAM.
    ///
    /// # Errors
    /// [`TransportError::Wire`] if the bytes are invalid.
    pub fn decode(body: &[u8]) -> Result<Self, TransportError> {
        let request: Self = from_bytes(REQUEST, body)?;
        request.check()?;
        Ok(request)
    }

    fn check(&self) -> Result<(), TransportError> {
        let (Self::Register(chunks) | Self::Release(chunks)) = self;
        check_len("a list of chunks", chunks.len(), CHUNKS_MAX)
    }
}

impl Keys {
    /// The bytes.
    ///
    /// # Errors
    /// [`TransportError::Wire`] for more than [`CHUNKS_MAX`] keys.
    pub fn encode(&self) -> Result<Vec<u8>, TransportError> {
        check_len("a list of keys", self.0.len(), CHUNKS_MAX)?;
        to_bytes(KEYS, self)
    }

    /// Reads the bytes.
    ///
    /// # Errors
    /// [`TransportError::Wire`] if the bytes are invalid.
    pub fn decode(body: &[u8]) -> Result<Self, TransportError> {
        let keys: Self = from_bytes(KEYS, body)?;
        check_len("a list of keys", keys.0.len(), CHUNKS_MAX)?;
        Ok(keys)
    }
}

const OFFERED: &str = "offer of queue pairs";
const READY: &str = "answer to an offer of queue pairs";
const REQUEST: &str = "request for registered memory";
const KEYS: &str = "list of keys";

fn check_lanes(endpoints: &[Endpoint]) -> Result<(), TransportError> {
    if endpoints.is_empty() {
        return Err(WireError::Malformed("list of lanes").into());
    }
    check_len("a list of lanes", endpoints.len(), LANES_MAX.into())
}

fn check_len(what: &'static str, len: usize, max: usize) -> Result<(), TransportError> {
    if len > max { Err(WireError::TooLong { what, len, max }.into()) } else { Ok(()) }
}

fn to_bytes(what: &'static str, value: &impl Serialize) -> Result<Vec<u8>, TransportError> {
    postcard::to_stdvec(value).map_err(|_| WireError::Malformed(what).into())
}

/// The control channel bounds the body before it is read, so a list in it takes memory in proportion to its
/// length.
fn from_bytes<T: DeserializeOwned>(what: &'static str, body: &[u8]) -> Result<T, TransportError> {
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        _ => Err(WireError::Malformed(what).into()),
    }
}

#[cfg(test)]
mod tests;
