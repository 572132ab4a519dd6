//! The source's end of all TCP streams.

use std::net::SocketAddr;

use super::lane::TcpLane;
use crate::control::ControlChannel;
use crate::memory::GuestRam;
use crate::transport::error::TransportError;
use crate::transport::lane::{Lane, Registration, Transport, count};
use crate::wire::Token;

/// Lanes that are TCP connections to the address of the control channel.
#[derive(Debug)]
pub(crate) struct TcpTransport {
    peer: SocketAddr,
    lanes: Vec<Box<dyn Lane>>,
}

impl TcpTransport {
    /// Connects `lanes` lanes to the peer of `control`, each with `token`. They end with the control channel.
    pub(crate) fn connect(
        control: &ControlChannel,
        lanes: u8,
        token: Token,
        ram: &GuestRam,
    ) -> Result<Self, TransportError> {
        let connect =
            |lane| Ok(Box::new(TcpLane::connect(control, lane, token, ram.clone())?) as Box<dyn Lane>);
        let lanes = (0..lanes).map(connect).collect::<Result<_, TransportError>>()?;
        Ok(Self { peer: control.peer_address(), lanes })
    }
}

impl Transport for TcpTransport {
    fn count(&self) -> usize {
        self.lanes.len()
    }

    fn via(&self) -> String {
        format!("{} to {}", count(self.lanes.len(), "TCP stream"), self.peer)
    }

    fn begin_round(&mut self) -> (&mut [Box<dyn Lane>], Option<&dyn Registration>) {
        (&mut self.lanes, None)
    }
}
