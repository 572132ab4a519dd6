use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sterna_rdma::RemoteKey;

use super::Once;
use crate::transport::tcp::TcpReceiver;
use crate::transport::{LaneConnections, LaneReceiver, Leak, Remains, TransportError};
use crate::wire::{ChunkKey, ChunkRange, LaneReady, Token};

/// What goes wrong at the destination.
#[derive(Debug, Default)]
pub(crate) struct ReceiverFaults {
    /// Guest RAM is not registered.
    pub(crate) register: Once,
    /// A round does not come to its end.
    pub(crate) await_round: Once,
    /// The device does not let go of a queue pair.
    pub(crate) revoke: Once,
    /// The device does not release memory after remote access was revoked.
    pub(crate) release: Once,
    /// How long to wait for the fences of a round; unless it is said, as long as in production.
    patience: Option<Duration>,
    /// Landings that are gone because a round did not come to its end, for whatever reason.
    given_up: AtomicUsize,
    /// The ends of lanes that a device did not let go of: the source can write on.
    kept: Mutex<Vec<TcpReceiver>>,
}

impl ReceiverFaults {
    /// None, but for fences that do not come within this time.
    pub(crate) fn impatient(patience: Duration) -> Self {
        Self { patience: Some(patience), ..Self::default() }
    }

    /// Whether anything went wrong, also by faults of the lanes. If it was a round, the lanes are closed by then, so that the source
    /// cannot but notice.
    pub(crate) fn has_struck(&self) -> bool {
        self.given_up.load(Ordering::Relaxed) > 0 || self.register.has_struck() || self.revoke.has_struck()
    }
}

/// A lane receiver of TCP lanes that passes for RDMA's.
#[derive(Debug)]
pub(crate) struct FaultyReceiver {
    tcp: TcpReceiver,
    faults: Arc<ReceiverFaults>,
    /// What is dropped behind the lanes, once a round did not come to its end.
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
    pub(crate) fn new(tcp: TcpReceiver, faults: Arc<ReceiverFaults>) -> Self {
        let tcp = match faults.patience {
            Some(patience) => tcp.with_patience(patience),
            None => tcp,
        };
        Self { tcp, faults, broken: None }
    }
}

impl LaneReceiver for FaultyReceiver {
    fn ready(&self) -> LaneReady {
        self.tcp.ready()
    }

    fn token(&self) -> Option<Token> {
        self.tcp.token()
    }

    fn connect(&mut self, connections: &dyn LaneConnections) -> Result<(), TransportError> {
        self.tcp.connect(connections)
    }

    fn register(&mut self, chunks: &[ChunkRange]) -> Result<Vec<ChunkKey>, TransportError> {
        self.faults.register.strike()?;
        let key = |_: &ChunkRange| ChunkKey { address: 0, key: RemoteKey::from_raw(0) };
        Ok(chunks.iter().map(key).collect())
    }

    fn release(&mut self, _slices: &[ChunkRange]) -> Result<(), TransportError> {
        Ok(())
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
            faults.kept.lock().unwrap_or_else(PoisonError::into_inner).push(tcp);
            return Err(error);
        }
        Box::new(tcp).revoke()?;
        Ok(Box::new(FaultyRemains(faults)))
    }
}

/// What would be registered memory.
#[derive(Debug)]
struct FaultyRemains(Arc<ReceiverFaults>);

impl Remains for FaultyRemains {
    fn release(self: Box<Self>) -> Result<(), Leak> {
        let error = || sterna_rdma::Error::RegionInUse;
        self.0.release.strike().map_err(|_| Leak { bytes: 3 << 20, error: error() })
    }
}
