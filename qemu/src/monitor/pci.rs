//! What the guest sees of its PCI devices.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::json;

use super::Monitor;
use crate::qmp::QmpError;

#[derive(Deserialize)]
struct Bus {
    bus: u64,
    devices: Vec<Function>,
}

#[derive(Deserialize)]
struct Function {
    slot: u32,
    function: u32,
    id: Id,
}

#[derive(Deserialize)]
struct Id {
    vendor: u16,
    device: u16,
}

impl Monitor {
    /// The vendor and the device, as the guest reads them, of each function on the first bus, by its number
    /// there: eight times the slot, and the function. Those behind bridges are not listed, because firmware
    /// has yet to number their buses in a machine that waits for a guest.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn pci_ids(&self) -> Result<BTreeMap<u32, (u16, u16)>, QmpError> {
        let buses: Vec<Bus> = self.ask("query-pci", &json!({}))?;
        let first = buses.into_iter().find(|bus| bus.bus == 0);
        let functions = first.into_iter().flat_map(|bus| bus.devices);
        Ok(functions
            .map(|function| {
                let Function { slot, function, id } = function;
                (slot.wrapping_mul(8) | (function & 7), (id.vendor, id.device))
            })
            .collect())
    }
}
