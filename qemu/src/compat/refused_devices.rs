//! Devices, and machines, that cannot be moved although QEMU itself might try.

use serde::Deserialize;
use serde_json::json;

use crate::monitor::{Child, Monitor};
use crate::qmp::QmpError;

/// Parts of the class of a device, and why such a device cannot be moved.
const CLASSES: [(&str, &str); 3] = [
    ("vfio-", "its state and its DMA are outside of the RAM that Sterna moves"),
    ("virtio-mem", "the stream does not name the pages that it has unplugged"),
    ("ivshmem-", "other guests write its memory too"),
];

#[derive(Deserialize)]
struct Tpm {
    id: String,
    options: TpmOptions,
}

#[derive(Deserialize)]
struct TpmOptions {
    #[serde(rename = "type")]
    kind: String,
}

/// Each device that cannot be moved, and why not.
pub(super) fn find(monitor: &Monitor) -> Result<Vec<(String, String)>, QmpError> {
    let mut found = of_classes(&monitor.devices()?);
    if let Some(path) = monitor.qom_find::<String>("/machine", "confidential-guest-support")?
        && !path.is_empty()
    {
        found.push((format!("the guest's memory is encrypted ({path})"), "no host can read it".into()));
    }
    let tpms = match monitor.client().execute("query-tpm", &json!({})) {
        Ok(answer) => serde_json::from_value::<Vec<Tpm>>(answer)
            .map_err(|error| QmpError::words("query-tpm", error.to_string()))?,
        // Built without TPMs.
        Err(error) if error.is_no_such_command() => Vec::new(),
        Err(error) => return Err(error),
    };
    let passed_through = tpms.into_iter().filter(|tpm| tpm.options.kind == "passthrough");
    found.extend(passed_through.map(|tpm| {
        (format!("the guest has the host's TPM ({})", tpm.id), "its keys stay in this host".into())
    }));
    Ok(found)
}

fn of_classes(devices: &[Child]) -> Vec<(String, String)> {
    let why = |device: &Child| CLASSES.iter().find(|(class, _)| device.class.starts_with(class));
    let refused = devices.iter().filter_map(|device| Some((device, why(device)?.1)));
    refused
        .map(|(device, why)| (format!("the device {} ({})", device.path, device.class), why.into()))
        .collect()
}
