//! Finds the devices of a machine with their places, from bus to bus.

use std::collections::BTreeMap;

use serde_json::Value;

use super::devices::{DEVICES_MAX, Device};
use crate::monitor::{Child, Monitor};
use crate::qmp::QmpError;

/// The devices, if QEMU knows its machine as one with PCI buses.
///
/// # Errors
///
/// Those of [`Client::execute_within`](crate::qmp::Client::execute_within), without a refusal.
pub(super) fn find(monitor: &Monitor) -> Result<Option<Vec<Device>>, QmpError> {
    match walk(monitor) {
        // Another kind of machine, or a device was unplugged meanwhile.
        Err(QmpError::Refused { .. } | QmpError::Words { .. }) => Ok(None),
        found => found,
    }
}

fn walk(monitor: &Monitor) -> Result<Option<Vec<Device>>, QmpError> {
    let Some(first) = first_bus(monitor)? else { return Ok(None) };
    let mut walk = Walk { monitor, found: Vec::new() };
    let ids = monitor.pci_ids()?;
    walk.pci_bus(&first, "00:", &ids)?;
    Ok(Some(walk.found).filter(|found| found.len() < DEVICES_MAX))
}

/// The bus of the machine's own PCI host.
fn first_bus(monitor: &Monitor) -> Result<Option<String>, QmpError> {
    for host in monitor.children("/machine")?.iter().filter(|child| child.class.ends_with("-pcihost")) {
        let bus = monitor.children(&host.path)?.into_iter().find(|child| is_pci(&child.class));
        if let Some(bus) = bus {
            return Ok(Some(bus.path));
        }
    }
    Ok(None)
}

struct Walk<'monitor> {
    monitor: &'monitor Monitor,
    found: Vec<Device>,
}

impl Walk<'_> {
    /// All devices of a PCI bus, whose places begin with `prefix`.
    fn pci_bus(&mut self, bus: &str, prefix: &str, ids: &BTreeMap<u32, (u16, u16)>) -> Result<(), QmpError> {
        for device in self.monitor.devices_on(bus)? {
            let number = self.monitor.qom_get::<Value>(&device.path, "addr")?;
            let Some(number) = number.as_u64().and_then(|number| u32::try_from(number).ok()) else {
                return Err(QmpError::words("qom-get", "a PCI device has no number"));
            };
            let place = format!("{prefix}{:02x}.{}", number >> 3, number & 7);
            let pci = ids.get(&number).copied();
            self.found.push(Device { place: place.clone(), class: device.class, pci });
            if self.found.len() >= DEVICES_MAX || place.len() > PLACE_MAX {
                return Ok(());
            }
            self.buses_of(&device.path, &place)?;
        }
        Ok(())
    }

    /// The buses that a device has.
    fn buses_of(&mut self, device: &str, place: &str) -> Result<(), QmpError> {
        for Child { path, class } in self.monitor.children(device)? {
            if is_pci(&class) {
                self.pci_bus(&path, &format!("{place}:"), &BTreeMap::new())?;
            } else if BUSES.contains(&class.as_str()) {
                let place = format!("{place} {class}");
                let devices = self.monitor.devices_on(&path)?.into_iter();
                let of_bus =
                    devices.map(|Child { class, .. }| Device { place: place.clone(), class, pci: None });
                self.found.extend(of_bus);
            } else if path.ends_with(VIRTIO) {
                self.buses_of(&path, place)?;
            }
        }
        Ok(())
    }
}

fn is_pci(class: &str) -> bool {
    class == "PCI" || class == "PCIE"
}

/// Buses whose devices the guest tells apart by more than their places.
const BUSES: [&str; 5] = ["HDA", "IDE", "SCSI", "usb-bus", "virtio-serial-bus"];

/// The part of a virtio device that has its buses.
const VIRTIO: &str = "/virtio-backend";

/// A place is this long behind some twenty bridges.
const PLACE_MAX: usize = 100;
