//! Why a figure has no value.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;

use thiserror::Error;

/// Why a figure could not be measured.
#[derive(Debug, Error)]
pub(crate) enum BenchError {
    /// The command could not be started.
    #[error("cannot run {program}: {error}; `cargo build --release` makes it, or name it with --sterna")]
    Start {
        /// The command.
        program: String,
        /// The system's answer.
        error: io::Error,
    },
    /// A migration failed that should have succeeded.
    #[error("`sterna {arguments}` ended with {status}: {said}")]
    Failed {
        /// Its arguments.
        arguments: String,
        /// Its exit status.
        status: ExitStatus,
        /// The end of its output.
        said: String,
    },
    /// The plot could not be written.
    #[error("cannot write {}: {error}", path.display())]
    Plot {
        /// Where it was to be.
        path: PathBuf,
        /// The system's answer.
        error: io::Error,
    },
    /// The machine has no dirty rings.
    #[error("a machine with dirty rings has none")]
    NoRings,
    /// The machine refused.
    #[error(transparent)]
    Machine(#[from] sterna_vmm::MachineError),
    /// The kernel refused.
    #[error("the dirty rings: {0}")]
    Rings(#[from] io::Error),
    /// The report has an unexpected form.
    #[error("`sterna` reported something else than was expected: {0}")]
    Report(#[from] serde_json::Error),
}
