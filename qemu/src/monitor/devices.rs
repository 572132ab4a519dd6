//! The objects of QEMU, devices among them.

use serde::Deserialize;
use serde_json::json;

use super::Monitor;
use crate::qmp::QmpError;

/// Where QEMU keeps the devices of its command line and of `device_add`: with an identity, and without.
const DEVICES: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// An object below another one.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Child {
    /// Its path.
    pub path: String,
    /// Its class, such as `virtio-net-pci`.
    pub class: String,
}

#[derive(Deserialize)]
struct Property {
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

impl Monitor {
    /// The objects below this one.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn children(&self, path: &str) -> Result<Vec<Child>, QmpError> {
        let children = self.properties(path)?.into_iter().filter_map(|property| {
            let class = property.kind.strip_prefix("child<")?.strip_suffix('>')?;
            Some(Child { path: format!("{path}/{}", property.name), class: class.to_owned() })
        });
        Ok(children.collect())
    }

    /// The devices on a bus.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn devices_on(&self, bus: &str) -> Result<Vec<Child>, QmpError> {
        let mut found = Vec::new();
        for Property { name, kind } in self.properties(bus)? {
            let class = kind.strip_prefix("link<").and_then(|kind| kind.strip_suffix('>'));
            if let Some(class) = class.filter(|_| name.starts_with("child[")) {
                found.push(Child { path: self.qom_get(bus, &name)?, class: class.to_owned() });
            }
        }
        Ok(found)
    }

    fn properties(&self, path: &str) -> Result<Vec<Property>, QmpError> {
        self.ask("qom-list", &json!({ "path": path }))
    }

    /// The devices that the command line or `device_add` made.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn devices(&self) -> Result<Vec<Child>, QmpError> {
        let mut devices = Vec::new();
        for path in DEVICES {
            devices.extend(self.children(path)?);
        }
        Ok(devices)
    }
}
