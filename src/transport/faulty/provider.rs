//! The provider of the faulty transport.

use std::sync::Arc;

use super::faults::{LaneFaults, ReceiverFaults};
use super::lanes::FaultyOffer;
use super::receiver::FaultyReceiver;
use crate::transport::error::TransportError;
use crate::transport::provider::{Destination, Source, SourceOffer, TransportProvider};
use crate::transport::receiver::LaneReceiver;
use crate::transport::tcp::TcpReceiver;
use crate::wire::LaneOffer;

/// A transport with faults, under the name of the transport that it passes for.
#[derive(Clone, Debug)]
pub(crate) struct FaultyProvider {
    scheme: &'static str,
    lanes: Arc<LaneFaults>,
    receiver: Arc<ReceiverFaults>,
}

impl FaultyProvider {
    /// With these faults at a source, and those at a destination.
    pub(crate) fn new(scheme: &'static str, lanes: Arc<LaneFaults>, receiver: Arc<ReceiverFaults>) -> Self {
        Self { scheme, lanes, receiver }
    }
}

impl TransportProvider for FaultyProvider {
    fn scheme(&self) -> &str {
        self.scheme
    }

    fn offer(&self, source: &Source<'_>) -> Result<Box<dyn SourceOffer>, TransportError> {
        Ok(Box::new(FaultyOffer::new(self.scheme, source.lanes.unwrap_or(4), self.lanes.clone())))
    }

    fn receive(
        &self,
        offer: &LaneOffer,
        destination: &Destination<'_>,
    ) -> Result<Box<dyn LaneReceiver>, TransportError> {
        let Destination { control, ram } = destination;
        let tcp = TcpReceiver::new(offer.lanes, ram, control.liveness())?;
        Ok(Box::new(FaultyReceiver::new(tcp, self.receiver.clone())))
    }
}
