//! RDMA as a transport to choose.

use super::offer::RdmaOffer;
use super::path::RdmaPath;
use super::receiver::RdmaReceiver;
use super::tuning::RdmaTuning;
use super::wire::Offered;
use crate::transport::error::TransportError;
use crate::transport::provider::{Destination, Source, SourceOffer, TransportProvider};
use crate::transport::receiver::LaneReceiver;
use crate::wire::LaneOffer;

/// RDMA from a device that has the address by which the peer is reached: hardware, else soft-RoCE. Where RDMA is the only
/// transport in the source's list, any active device will do, and a smaller part of RAM that may be pinned.
#[derive(Clone, Copy, Debug, Default)]
pub struct RdmaProvider {
    tuning: RdmaTuning,
}

impl RdmaProvider {
    /// Its name.
    pub const SCHEME: &'static str = "rdma";

    /// With lanes that post so at a source, and at most so much memory pinned at either end.
    #[must_use]
    pub fn new(tuning: RdmaTuning) -> Self {
        Self { tuning }
    }
}

impl TransportProvider for RdmaProvider {
    fn scheme(&self) -> &str {
        Self::SCHEME
    }

    fn offer(&self, source: &Source<'_>) -> Result<Box<dyn SourceOffer>, TransportError> {
        let &Source { control, ram, lanes, by_name } = source;
        let path = RdmaPath::find(control.local_ip(), by_name)?;
        let lanes = lanes.unwrap_or(LANES_DEFAULT);
        Ok(Box::new(RdmaOffer::make(path, ram, lanes, self.tuning, by_name)?))
    }

    fn receive(
        &self,
        offer: &LaneOffer,
        destination: &Destination<'_>,
    ) -> Result<Box<dyn LaneReceiver>, TransportError> {
        let &Destination { control, ram } = destination;
        let Offered { endpoints, any_device } = Offered::decode(&offer.body, offer.lanes)?;
        let path = RdmaPath::find(control.local_ip(), any_device)?;
        let pin_max_bytes = self.tuning.pin_max_bytes;
        Ok(Box::new(RdmaReceiver::make(&path, ram, &endpoints, pin_max_bytes, any_device)?))
    }

    fn pins_memory(&self) -> bool {
        true
    }
}

/// The work of a queue pair is the adapter's, or that of the kernel's threads, not the lane's: four keep either busy, also for fewer
/// processors, where they are as fast as one.
const LANES_DEFAULT: u8 = 4;
