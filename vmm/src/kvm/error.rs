//! The error of a call that KVM refuses.

use crate::error::MachineError;

/// Makes an error that names the purpose of a refused call.
pub(super) fn refused(doing: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |error| MachineError::Kvm { doing: doing.to_owned(), source: error.into() }
}
