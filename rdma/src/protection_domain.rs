//! A protection domain.

use std::sync::Arc;

use crate::device::Device;
use crate::error::Error;
use crate::sys::domain::Domain;

/// Regions and queue pairs that may work together. A peer connected to a queue pair reaches only regions of
/// its domain, so every migration attempt gets a domain of its own.
#[derive(Debug)]
pub struct ProtectionDomain {
    domain: Arc<Domain>,
    device: Arc<Device>,
}

impl ProtectionDomain {
    /// Allocates one on a device.
    ///
    /// # Errors
    /// [`Error::Call`] when the device has none left.
    pub fn new(device: &Arc<Device>) -> Result<Arc<ProtectionDomain>, Error> {
        let domain = Domain::allocate(device.context())?;
        Ok(Arc::new(ProtectionDomain { domain, device: Arc::clone(device) }))
    }

    /// The device that owns the domain.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(crate) fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }
}
