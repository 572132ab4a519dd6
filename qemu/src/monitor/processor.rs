//! The guest's processors.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

use super::Monitor;
use crate::qmp::QmpError;

/// A processor of the guest.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Vcpu {
    /// Its number.
    pub cpu_index: u32,
    /// The thread that runs it.
    pub thread_id: i32,
    /// Its object.
    pub qom_path: String,
}

/// A model of a processor, with its properties.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[non_exhaustive]
pub struct CpuModel {
    /// Its name, such as `host` or `qemu64`.
    pub name: String,
    /// Features, such as `avx2`, and the like.
    #[serde(default)]
    pub props: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
struct Expansion {
    model: CpuModel,
}

impl Monitor {
    /// The guest's processors.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn vcpus(&self) -> Result<Vec<Vcpu>, QmpError> {
        self.ask("query-cpus-fast", &json!({}))
    }

    /// All properties of a model, as this host and this QEMU would have them.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn cpu_model_expansion(&self, name: &str) -> Result<CpuModel, QmpError> {
        let arguments = json!({ "type": "full", "model": { "name": name } });
        self.ask("query-cpu-model-expansion", &arguments).map(|answer: Expansion| answer.model)
    }

    /// The model of a processor of this guest, with the properties that this processor has: the command line
    /// may have changed those of the model.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn cpu_model(&self, vcpu: &Vcpu) -> Result<CpuModel, QmpError> {
        let class: String = self.qom_get(&vcpu.qom_path, "type")?;
        let name = class.strip_suffix("-cpu").and_then(|class| Some(class.rsplit_once('-')?.0));
        let mut model = self.cpu_model_expansion(name.unwrap_or(&class))?;
        for (property, value) in &mut model.props {
            if let Some(present) = self.qom_find(&vcpu.qom_path, property)? {
                *value = present;
            }
        }
        model.name = name.unwrap_or(&class).to_owned();
        Ok(model)
    }
}
