//! What keeps a guest from running at the destination as it does at the source.

use super::description::Description;
use super::{block, devices};
use crate::text::shown;

/// How many differences are listed.
const LISTED_MAX: usize = 32;

impl Description {
    /// What does not fit at the destination, each in a sentence; empty if the guest can move.
    ///
    /// The versions of QEMU may differ, for the type of the machine fixes what the guest sees. So may the
    /// state of the vCPUs.
    #[must_use]
    pub fn differences(&self, destination: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let mut compare = |what: &str, source: &str, destination: &str| {
            if source != destination {
                found.push(format!("{what} is {source} at the source and {destination} at the destination"));
            }
        };
        compare("the machine type", &self.machine_type, &destination.machine_type);
        compare("the accelerator", &self.accelerator.to_string(), &destination.accelerator.to_string());
        compare("the number of vCPUs", &self.vcpus.to_string(), &destination.vcpus.to_string());
        compare("the UUID", uuid(self), uuid(destination));
        found.extend(self.cpu.differences(&destination.cpu));
        found.extend(block::differences(&self.blocks, &destination.blocks));
        if let (Some(source), Some(destination)) = (&self.devices, &destination.devices) {
            found.extend(devices::differences(source, destination));
        }
        let more = found.len().saturating_sub(LISTED_MAX);
        found.truncate(LISTED_MAX);
        found.extend((more > 0).then(|| format!("{more} more")));
        // The names are those of a peer.
        found.iter().map(|difference| shown(difference)).collect()
    }
}

fn uuid(description: &Description) -> &str {
    description.uuid.as_deref().unwrap_or("not set")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::compat::cpu::Cpu;
    use crate::compat::description::{DESCRIPTION_MAX, DescriptionError};
    use crate::monitor::{Accelerator, CpuModel};

    fn description() -> Description {
        let model: CpuModel = serde_json::from_value(json!({
            "name": "qemu64",
            "props": { "sse": true, "family": 15, "vendor": "AuthenticAMD" },
        }))
        .unwrap();
        Description {
            version: serde_json::from_value(json!({ "major": 7, "minor": 2, "micro": 22 })).unwrap(),
            machine_type: "pc-q35-7.2".into(),
            accelerator: Accelerator::Kvm,
            vcpus: 2,
            cpu: Cpu::new(model),
            blocks: Vec::new(),
            devices: None,
            uuid: None,
            was_paused: false,
        }
    }

    #[test]
    fn the_same_machine_in_another_version_of_qemu_fits() {
        let version = serde_json::from_value(json!({ "major": 10, "minor": 0, "micro": 2 })).unwrap();
        let destination = Description { version, was_paused: true, ..description() };
        assert_eq!(description().differences(&destination), [""; 0]);
    }

    #[test]
    fn each_difference_is_named() {
        let destination = Description {
            machine_type: "pc-q35-10.0".into(),
            accelerator: Accelerator::Tcg,
            vcpus: 4,
            uuid: Some("ab".into()),
            ..description()
        };
        assert_eq!(
            description().differences(&destination),
            [
                "the machine type is pc-q35-7.2 at the source and pc-q35-10.0 at the destination",
                "the accelerator is KVM at the source and TCG at the destination",
                "the number of vCPUs is 2 at the source and 4 at the destination",
                "the UUID is not set at the source and ab at the destination",
            ]
        );
    }

    #[test]
    fn what_a_peer_names_is_bounded_and_fit_for_a_terminal() {
        let blocks =
            (0..1000).map(|n| json!({ "name": format!("\u{1b}[2J{n}"), "used_bytes": 1, "total_bytes": 1 }));
        let blocks = blocks.map(|block| serde_json::from_value(block).unwrap()).collect();
        let peer = Description { blocks, machine_type: "x\n".repeat(100_000), ..description() };
        let found = peer.differences(&description());
        assert_eq!(found.len(), LISTED_MAX + 1);
        assert!(
            found.iter().all(|difference| difference.len() < 4000 && !difference.contains(char::is_control))
        );
        assert_eq!(found.last().unwrap(), "969 more");
    }

    #[test]
    fn a_description_comes_back_from_its_bytes() {
        let bytes = description().encode().unwrap();
        assert_eq!(Description::decode(&bytes).unwrap(), description());
        for len in 0..bytes.len() {
            assert!(Description::decode(&bytes[..len]).is_err(), "{len}");
        }
        assert!(matches!(Description::decode(&[&bytes[..], b"x"].concat()), Err(DescriptionError::Rest(1))));
        assert!(matches!(Description::decode(&[1, 0, 0]), Err(DescriptionError::Format)));
    }

    #[test]
    fn a_description_that_is_too_long_is_neither_sent_nor_read() {
        let long = Description { machine_type: "x".repeat(DESCRIPTION_MAX), ..description() };
        assert!(matches!(long.encode(), Err(DescriptionError::TooLong(_))));
        let bytes = vec![1; DESCRIPTION_MAX + 1];
        assert!(matches!(Description::decode(&bytes), Err(DescriptionError::TooLong(_))));
    }

    #[test]
    fn a_peer_that_announces_billions_of_blocks_costs_nothing() {
        let mut bytes = description().encode().unwrap();
        // The count of blocks is before the devices, the UUID and the last flag.
        let at = bytes.len() - 4;
        assert_eq!(bytes[at..], [0, 0, 0, 0]);
        bytes.splice(at..=at, [0xff, 0xff, 0xff, 0xff, 0x0f]);
        assert!(matches!(Description::decode(&bytes), Err(DescriptionError::Encoding(_))));
    }
}
