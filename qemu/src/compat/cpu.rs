//! What the guest sees of its processor.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::monitor::CpuModel;
use crate::text::shown;

/// The most properties of a processor. QEMU 10 has about 400, most of which are off.
pub(super) const PROPERTIES_MAX: usize = 4096;

/// How many names a sentence lists.
const LISTED_MAX: usize = 24;

/// Properties that say how QEMU makes the processor, where it sits or how fast the host is.
const NOT_OF_THE_GUEST: [&str; 30] = [
    "apic-id",
    "check",
    "core-id",
    "cpuid-0xb",
    "die-id",
    "enforce",
    "fill-mtrr-mask",
    "full-cpuid-auto-level",
    "host-cache-info",
    "host-phys-bits",
    "host-phys-bits-limit",
    "hotpluggable",
    "hotplugged",
    "kvm",
    "kvm-no-smi-migration",
    "l3-cache",
    "memory",
    "migratable",
    "min-level",
    "min-xlevel",
    "min-xlevel2",
    "model-id",
    "module-id",
    "node-id",
    "realized",
    "socket-id",
    "start-powered-off",
    "thread-id",
    "tsc-frequency",
    "ucode-rev",
];

/// How QEMU names what keeps old types of machines as they were.
const INTERNAL: [&str; 2] = ["legacy-", "x-"];

/// A processor: its model, and what the guest sees.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Cpu {
    /// The name of the model, such as `host`.
    pub model: String,
    /// The properties. A feature that is off has none.
    pub properties: BTreeMap<String, CpuValue>,
}

/// The value of a property.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub enum CpuValue {
    /// A feature that is on.
    On,
    /// A number, such as that of the family.
    Number(i64),
    /// A text, such as the vendor.
    Text(String),
}

impl Cpu {
    pub(super) fn new(model: CpuModel) -> Self {
        let of_guest = |name: &str| {
            !NOT_OF_THE_GUEST.contains(&name) && !INTERNAL.iter().any(|prefix| name.starts_with(prefix))
        };
        let properties =
            model.props.into_iter().filter(|(name, _)| of_guest(name)).filter_map(|(name, value)| {
                let value = match value {
                    Value::Bool(true) => CpuValue::On,
                    Value::Number(number) => CpuValue::Number(number.as_i64()?),
                    Value::String(text) if !text.is_empty() => CpuValue::Text(text),
                    _ => return None,
                };
                Some((name, value))
            });
        Self { model: model.name, properties: properties.take(PROPERTIES_MAX).collect() }
    }

    /// What differs between two processors, in words.
    pub(super) fn differences(&self, destination: &Self) -> Vec<String> {
        let mut found = Vec::new();
        if self.model != destination.model {
            found.push(format!(
                "the CPU is {} at the source and {} at the destination",
                self.model, destination.model
            ));
        }
        let lacking = features_without(self, destination);
        if !lacking.is_empty() {
            found.push(format!("the CPU at the destination lacks {}", list(&lacking)));
        }
        let extra = features_without(destination, self);
        if !extra.is_empty() {
            found.push(format!(
                "the CPU at the destination has {}, which the CPU at the source lacks",
                list(&extra)
            ));
        }
        for (name, value) in self.properties.iter().filter(|(_, value)| **value != CpuValue::On) {
            match destination.properties.get(name) {
                Some(other) if other != value => {
                    let (value, other) = (value.shown(), other.shown());
                    found.push(format!(
                        "{name} of the CPU is {value} at the source and {other} at the destination"
                    ));
                }
                // One that is not there is that of another version of QEMU.
                _ => {}
            }
        }
        found
    }
}

impl CpuValue {
    fn shown(&self) -> String {
        match self {
            Self::On => "on".into(),
            Self::Number(number) => number.to_string(),
            Self::Text(text) => shown(text),
        }
    }
}

fn features_without<'a>(with: &'a Cpu, without: &Cpu) -> Vec<&'a str> {
    let on = with.properties.iter().filter(|(_, value)| **value == CpuValue::On);
    let names = on.filter(|(name, _)| !without.properties.contains_key(*name));
    names.map(|(name, _)| name.as_str()).collect()
}

fn list(names: &[&str]) -> String {
    let (listed, more) = names.split_at(names.len().min(LISTED_MAX));
    let listed = listed.join(", ");
    if more.is_empty() { listed } else { format!("{listed} and {} more", more.len()) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn cpu(name: &str, props: &Value) -> Cpu {
        let model = json!({ "name": name, "props": props });
        Cpu::new(serde_json::from_value(model).unwrap())
    }

    #[test]
    fn features_and_numbers_that_differ_are_named() {
        let source =
            cpu("host", &json!({ "avx2": true, "x2apic": true, "family": 6, "vme": false, "apic-id": 0 }));
        let destination = cpu("EPYC", &json!({ "vme": true, "avx2": false, "family": 23, "apic-id": 7 }));
        assert_eq!(
            source.differences(&destination),
            [
                "the CPU is host at the source and EPYC at the destination",
                "the CPU at the destination lacks avx2, x2apic",
                "the CPU at the destination has vme, which the CPU at the source lacks",
                "family of the CPU is 6 at the source and 23 at the destination",
            ]
        );
    }

    #[test]
    fn a_feature_that_another_version_of_qemu_does_not_know_is_off_in_it() {
        let old = cpu("qemu64", &json!({ "sse": true }));
        let new = cpu("qemu64", &json!({ "sse": true, "avx10": false, "avx10-version": 0, "x-new": true }));
        assert!(old.differences(&new).is_empty());
        assert!(new.differences(&old).is_empty());
    }

    #[test]
    fn a_sentence_does_not_list_hundreds() {
        let many: serde_json::Map<_, _> = (0..100).map(|n| (format!("f{n:02}"), true.into())).collect();
        let found = cpu("a", &Value::Object(many)).differences(&cpu("a", &json!({})));
        assert!(found[0].ends_with("f23 and 76 more"), "{found:?}");
    }
}
