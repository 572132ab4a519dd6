//! The destination's end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use sterna_rdma::RemoteKey;

use super::faults::ReceiverFaults;
use crate::poison::IgnorePoison;
use crate::transport::error::TransportError;
use crate::transport::rdma::wire::{ChunkKey, Keys, Request};
use crate::transport::receiver::{LaneConnections, LaneReceiver};
use crate::transport::remains::{Leak, Remains};
use crate::transport::tcp::TcpReceiver;
use crate::wire::Token;

/// A lane receiver of TCP lanes that passes for RDMA's.
#[derive(Debug)]
pub(super) struct FaultyReceiver {
    tcp: TcpReceiver,
    faults: Arc<ReceiverFaults>,
    /// Dropped after the lanes, once a round did not end.
    broken: Option<GivenUp>,
}

/// Counts a lane receiver that is given up, when it is dropped.
#[derive(Debug)]
struct GivenUp(Arc<ReceiverFaults>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.given_up.fetch_add(1, Ordering::Relaxed);
    }
}

impl FaultyReceiver {
    pub(super) fn new(tcp: TcpReceiver, faults: Arc<ReceiverFaults>) -> Self {
        let tcp = match faults.patience {
            Some(patience) => tcp.with_patience(patience),
            None => tcp,
        };
        Self { tcp, faults, broken: None }
    }
}

impl LaneReceiver for FaultyReceiver {
    fn ready(&self) -> Result<Vec<u8>, TransportError> {
        self.tcp.ready()
    }

    fn token(&self) -> Option<Token> {
        self.tcp.token()
    }

    fn connect(&mut self, connections: &dyn LaneConnections) -> Result<(), TransportError> {
        self.tcp.connect(connections)
    }

    fn handle(&mut self, request: &[u8]) -> Result<Option<Vec<u8>>, TransportError> {
        match Request::decode(request)? {
            Request::Register(chunks) => {
                self.faults.register.strike()?;
                let key = ChunkKey { address: 0, key: RemoteKey::from_raw(0) };
                Keys(vec![key; chunks.len()]).encode().map(Some)
            }
            Request::Release(_) => Ok(None),
        }
    }

    fn await_round(&mut self, round: u32) -> Result<(), TransportError> {
        let ended = self.tcp.await_round(round).and_then(|()| self.faults.await_round.strike());
        ended.inspect_err(|_| self.broken = Some(GivenUp(self.faults.clone())))
    }

    fn revoke_time(&self) -> Duration {
        self.tcp.revoke_time()
    }

    fn revoke(self: Box<Self>) -> Result<Box<dyn Remains>, TransportError> {
        let Self { tcp, faults, broken: _broken } = *self;
        if let Err(error) = faults.revoke.strike() {
            faults.kept.lock().ignore_poison().push(tcp);
            return Err(error);
        }
        Box::new(tcp).revoke()?;
        Ok(Box::new(FaultyRemains(faults)))
    }
}

/// Stands for registered memory.
#[derive(Debug)]
struct FaultyRemains(Arc<ReceiverFaults>);

impl Remains for FaultyRemains {
    fn release(self: Box<Self>) -> Result<(), Leak> {
        self.0.release.strike().map_err(|error| Leak { bytes: 3 << 20, error })
    }
}
