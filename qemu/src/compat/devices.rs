//! The devices of a guest, of which the destination must have the same at the same places.
//!
//! QEMU refuses a state with a device that it has not. A device that only the destination has stays as if it
//! were just switched on, and QEMU does not say so.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// The most devices that are compared.
pub(super) const DEVICES_MAX: usize = 1024;

/// A device.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Device {
    /// Where it is, as QEMU names it in a stream, such as `00:03.0`, behind a bridge `00:02.0:00.0`; or on
    /// which other bus, such as `00:04.0 usb-bus`, which may have several.
    pub place: String,
    /// QEMU's class of it, such as `virtio-net-pci`.
    pub class: String,
    /// What a guest reads from a PCI device on the first bus: vendor and device.
    pub pci: Option<(u16, u16)>,
}

impl Device {
    /// Whether the guest sees the same. QEMU may name a class anew; what the guest reads stays.
    fn is_like(&self, other: &Self) -> bool {
        match (self.pci, other.pci) {
            (Some(this), Some(other)) => this == other,
            _ => base(&self.class) == base(&other.class),
        }
    }
}

/// The class without what can be said by an option as well.
fn base(class: &str) -> &str {
    let forms = ["-non-transitional", "-transitional"];
    forms.iter().find_map(|form| class.strip_suffix(form)).unwrap_or(class)
}

/// What differs between the devices of two machines, in words.
pub(super) fn differences(source: &[Device], destination: &[Device]) -> Vec<String> {
    let (mut source, mut destination) = (by_place(source), by_place(destination));
    let places: BTreeSet<_> = source.keys().chain(destination.keys()).copied().collect();
    let mut found = Vec::new();
    for place in places {
        let mut lacking = source.remove(place).unwrap_or_default();
        let mut extra = destination.remove(place).unwrap_or_default();
        lacking.retain(|device| {
            let equal = extra.iter().position(|other| other == device);
            let like = equal.or_else(|| extra.iter().position(|other| other.is_like(device)));
            if let Some(like) = like {
                extra.swap_remove(like);
            }
            like.is_none()
        });
        if let ([one], [other]) = (&lacking[..], &extra[..]) {
            let (one, other) = (&one.class, &other.class);
            found
                .push(format!("the device at {place} is {one} at the source and {other} at the destination"));
            continue;
        }
        let lacking = lacking
            .iter()
            .map(|Device { class, .. }| format!("the device {class} at {place} is not at the destination"));
        let extra = extra
            .iter()
            .map(|Device { class, .. }| format!("the device {class} at {place} is at the destination only"));
        found.extend(lacking.chain(extra));
    }
    found
}

fn by_place(devices: &[Device]) -> BTreeMap<&str, Vec<&Device>> {
    let mut by_place = BTreeMap::<_, Vec<_>>::new();
    for device in devices {
        by_place.entry(device.place.as_str()).or_default().push(device);
    }
    by_place
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(place: &str, class: &str, pci: Option<(u16, u16)>) -> Device {
        Device { place: place.into(), class: class.into(), pci }
    }

    #[test]
    fn a_device_that_one_end_lacks_is_named_with_its_place() {
        let rng = |place| device(place, "virtio-rng-pci", Some((0x1af4, 0x1005)));
        assert_eq!(
            differences(&[rng("00:1d.0")], &[rng("00:1e.0")]),
            [
                "the device virtio-rng-pci at 00:1d.0 is not at the destination",
                "the device virtio-rng-pci at 00:1e.0 is at the destination only",
            ]
        );
    }

    #[test]
    fn another_device_at_the_same_place_is_named() {
        let found = differences(&[device("00:03.0", "e1000", None)], &[device("00:03.0", "nvme", None)]);
        assert_eq!(found, ["the device at 00:03.0 is e1000 at the source and nvme at the destination"]);
    }

    #[test]
    fn what_a_guest_reads_counts_more_than_the_name_of_a_class() {
        let ids = Some((0x8086, 0x2930));
        let (old, new) = (device("00:1f.3", "ICH9 SMB", ids), device("00:1f.3", "ICH9-SMB", ids));
        assert_eq!(differences(&[old], &[new]), [""; 0]);
        let modern = device("00:02.0:00.0", "virtio-net-pci-non-transitional", None);
        assert_eq!(differences(&[device("00:02.0:00.0", "virtio-net-pci", None)], &[modern]), [""; 0]);
    }

    #[test]
    fn devices_of_one_bus_are_counted_by_class_in_any_order() {
        let usb = |class| device("00:04.0 usb-bus", class, None);
        let (tablet, keyboard) = (usb("usb-tablet"), usb("usb-kbd"));
        let source = [tablet.clone(), keyboard.clone()];
        assert_eq!(differences(&source, &[keyboard.clone(), tablet.clone()]), [""; 0]);
        assert_eq!(
            differences(&source, &[keyboard.clone(), tablet, keyboard]),
            ["the device usb-kbd at 00:04.0 usb-bus is at the destination only"]
        );
    }
}
