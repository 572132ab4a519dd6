//! A check and its outcome.

use serde::Serialize;

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    /// The check, as `group.name`. Does not change between releases; checks of several devices may share an
    /// id.
    pub(crate) id: &'static str,
    /// The outcome.
    pub(crate) outcome: Outcome,
    /// The finding, in a sentence.
    pub(crate) found: String,
    /// The command that fixes a lack, or a sentence if no command can. None if nothing lacks.
    pub(crate) remedy: Option<String>,
}

impl Check {
    /// The part of the id before the dot.
    #[must_use]
    pub(crate) fn group(&self) -> &'static str {
        self.id.split_once('.').map_or(self.id, |(group, _)| group)
    }

    pub(super) fn new(id: &'static str, outcome: Outcome, found: impl Into<String>) -> Self {
        Self { id, outcome, found: found.into(), remedy: None }
    }

    pub(super) fn mend(self, remedy: impl Into<Option<String>>) -> Self {
        Self { remedy: remedy.into(), ..self }
    }
}

/// The outcome of a check, from good to bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub(crate) enum Outcome {
    /// As it should be.
    Pass,
    /// A note; all that was set up works.
    Info,
    /// Something will be slow, or something that is set up cannot be used.
    Warn,
    /// This machine cannot run or move guests.
    Fail,
}
