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

/// Second names of features; a name with `-` has a second one with `_`, too.
const SECOND_NAMES: [&str; 7] = ["ffxsr", "i64", "pclmuldq", "sse3", "sse4-1", "sse4-2", "xd"];

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
    /// may have changed those of the model, and the host may lack some. Each has one name.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn cpu_model(&self, vcpu: &Vcpu) -> Result<CpuModel, QmpError> {
        let class: String = self.qom_get(&vcpu.qom_path, "type")?;
        let name = class.strip_suffix("-cpu").and_then(|class| Some(class.rsplit_once('-')?.0));
        let mut model = self.cpu_model_expansion(name.unwrap_or(&class))?;
        name.unwrap_or(&class).clone_into(&mut model.name);
        model.props.retain(|name, _| !is_second_name(name));
        // The expansion has the changes of the command line, but not those that the host made.
        let unavailable: Option<Vec<String>> = self.qom_find(&vcpu.qom_path, "unavailable-features")?;
        for name in unavailable.iter().flatten() {
            model.props.entry(name.clone()).and_modify(|value| *value = false.into());
        }
        for (property, value) in &mut model.props {
            // To ask for each of 500 features takes QEMU half a second.
            let is_settled = unavailable.is_some() && value.is_boolean();
            if !is_settled && let Some(present) = self.qom_find(&vcpu.qom_path, property)? {
                *value = present;
            }
        }
        Ok(model)
    }
}

fn is_second_name(name: &str) -> bool {
    SECOND_NAMES.contains(&name) || name.contains('_')
}
