//! What the readings mean for running and moving guests.

mod kvm;
mod memory;
mod network;
mod rdma;

use super::check::Check;
use super::readings::Readings;

/// Judges the readings.
#[must_use]
pub(crate) fn judge(readings: &Readings) -> Vec<Check> {
    let mut checks = kvm::judge(&readings.kvm, &readings.platform);
    checks.extend(memory::judge(readings));
    checks.extend(rdma::judge(readings));
    checks.extend(network::judge(readings));
    checks
}
