//! Which ways of moving a guest work on this machine.

use serde::Serialize;

use super::readings::Readings;

/// Which ways of moving a guest work on this machine. TCP always does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Transports {
    /// Hardware devices that are ready.
    pub(crate) rdma: Vec<String>,
    /// Soft-RoCE devices that are ready.
    pub(crate) soft_roce: Vec<String>,
    /// Always true.
    pub(crate) tcp: bool,
}

impl Transports {
    /// Judges the readings. A device is ready if the library opens it and one of its ports could carry a
    /// connection.
    #[must_use]
    pub(crate) fn of(readings: &Readings) -> Self {
        let ready = |soft: bool| {
            let devices = readings.rdma.devices.iter();
            devices
                .filter(|device| device.soft_roce_on.is_some() == soft && readings.rdma.ready(device))
                .map(|device| device.name.clone())
                .collect()
        };
        Self { rdma: ready(false), soft_roce: ready(true), tcp: true }
    }
}
