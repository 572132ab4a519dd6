use std::io;
use std::process::ExitStatus;
use std::time::Duration;

use sterna_qemu::qmp::QmpError;
use thiserror::Error;

/// Why a figure could not be measured.
#[derive(Debug, Error)]
pub(crate) enum Failure {
    #[error("{program} is not installed: `apt install {package}`")]
    Missing { program: &'static str, package: &'static str },
    #[error("no RDMA device: {0}; `ci/lab uml` has one, `sterna soft-roce up` makes one")]
    NoDevice(String),
    #[error("left out by --without-rdma")]
    WithoutRdma,
    #[error("cannot {doing}: {error}")]
    System { doing: String, error: io::Error },
    #[error("{what} failed ({status}): {said}")]
    Ended { what: String, status: ExitStatus, said: String },
    #[error("{what} did not {doing} in {} s: {said}", limit.as_secs())]
    Late { what: String, doing: &'static str, limit: Duration, said: String },
    #[error("did not converge in {} s", .0.as_secs())]
    NotConverged(Duration),
    #[error("did not end in {} s", .0.as_secs())]
    NotEnded(Duration),
    #[error("{what} says what is not understood: {said}")]
    Words { what: String, said: String },
    #[error("{0}")]
    Sterna(String),
    #[error("WRONG MEMORY: {what} differs at page {page} of the guest")]
    Differs { what: String, page: u64 },
    #[error("{0}: times too short to tell")]
    TooShort(String),
    #[error("QEMU: {0}")]
    Qmp(#[from] QmpError),
    #[error("QEMU: the migration failed: {0}")]
    Migration(String),
    #[error("not reported by this version of sterna")]
    NotReported,
}

impl Failure {
    /// For `map_err`: a system call that failed while `doing`.
    pub(crate) fn system(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |error| Self::System { doing, error }
    }
}
