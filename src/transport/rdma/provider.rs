//! The provider of RDMA.

use super::library;
use super::offer::RdmaOffer;
use super::path::RdmaPath;
use super::receiver::RdmaReceiver;
use super::tuning::RdmaTuning;
use super::wire::Offered;
use crate::transport::error::TransportError;
use crate::transport::provider::{Destination, Source, SourceOffer, TransportProvider};
use crate::transport::receiver::LaneReceiver;
use crate::wire::LaneOffer;

/// RDMA from a device with the address by which the peer is reached: hardware, else soft-RoCE. If RDMA is the
/// only transport in the source's list, any active device is enough, and so is a smaller limit on pinned
/// memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct RdmaProvider {
    tuning: RdmaTuning,
}

impl RdmaProvider {
    /// Its name.
    pub const SCHEME: &'static str = "rdma";

    /// Loads libibverbs and its drivers in a thread of its own, and returns at once. A VMM may call it before
    /// a migration: the library opens a score of drivers at the first request for devices, which costs a
    /// migration some tens of milliseconds at its start, at each end in turn. Without a device, or without
    /// the library, nothing happens; a later user of RDMA gets the error.
    pub fn load_ahead() {
        library::load_ahead();
    }

    /// With this tuning of posting at a source, and this limit on pinned memory at either end.
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

/// The adapter or the kernel's threads do the work of a queue pair, not the lane. Four keep either busy, even
/// with fewer processors, where four are as fast as one.
const LANES_DEFAULT: u8 = 4;
