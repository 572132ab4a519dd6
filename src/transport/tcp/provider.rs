//! The provider of TCP.

use std::thread;

use super::receiver::TcpReceiver;
use super::transport::TcpTransport;
use crate::control::ControlChannel;
use crate::memory::GuestRam;
use crate::transport::error::TransportError;
use crate::transport::lane::Transport;
use crate::transport::provider::{Destination, Source, SourceOffer, TransportProvider};
use crate::transport::receiver::LaneReceiver;
use crate::wire::{LaneOffer, Token};

/// TCP, to the address of the control channel. The offer contains only the number of lanes; READY has the
/// token that each connection presents.
#[derive(Clone, Copy, Debug, Default)]
pub struct TcpProvider;

impl TcpProvider {
    /// Its name.
    pub const SCHEME: &'static str = "tcp";
}

impl TransportProvider for TcpProvider {
    fn scheme(&self) -> &str {
        Self::SCHEME
    }

    fn offer(&self, source: &Source<'_>) -> Result<Box<dyn SourceOffer>, TransportError> {
        Ok(Box::new(TcpOffer { lanes: source.lanes.unwrap_or_else(lanes_default) }))
    }

    fn receive(
        &self,
        offer: &LaneOffer,
        destination: &Destination<'_>,
    ) -> Result<Box<dyn LaneReceiver>, TransportError> {
        let Destination { control, ram } = destination;
        Ok(Box::new(TcpReceiver::new(offer.lanes, ram, control.liveness())?))
    }
}

/// The sender does a stream's work: more streams than processors cannot help, and four fill most links.
fn lanes_default() -> u8 {
    let processors = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u8::try_from(processors.min(4)).unwrap_or(4)
}

/// Streams that have yet to be opened.
#[derive(Debug)]
struct TcpOffer {
    lanes: u8,
}

impl SourceOffer for TcpOffer {
    fn lanes(&self) -> u8 {
        self.lanes
    }

    fn body(&self) -> Result<Vec<u8>, TransportError> {
        Ok(Vec::new())
    }

    fn connect(
        self: Box<Self>,
        ready: &[u8],
        control: &ControlChannel,
        ram: &GuestRam,
    ) -> Result<Box<dyn Transport>, TransportError> {
        let token = ready.try_into().map(Token);
        let token =
            token.map_err(|_| TransportError::Disagreement("READY has no token for TCP lanes".into()))?;
        Ok(Box::new(TcpTransport::connect(control, self.lanes, token, ram)?))
    }
}
