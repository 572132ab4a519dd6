//! How to reach the process that has a guest, and the guest's VMM, as the guest's state file says.

use std::path::{Path, PathBuf};

use sterna::state::LockHolder;

/// What a process that holds a guest announces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Contact {
    /// The folder of its control sockets.
    pub(crate) sockets: PathBuf,
    /// The monitor of the guest's QEMU, which outlives the process.
    pub(crate) qmp: Option<PathBuf>,
}

impl Contact {
    /// The contact in a state file, if there is any.
    pub(crate) fn of(holder: &LockHolder) -> Option<Self> {
        let text = holder.contact.as_deref()?;
        let (sockets, qmp) = match text.rsplit_once(QMP) {
            Some((sockets, qmp)) => (sockets, Some(PathBuf::from(qmp))),
            None => (text, None),
        };
        Some(Self { sockets: sockets.into(), qmp })
    }

    /// As one line.
    pub(crate) fn line(sockets: &str, qmp: Option<&Path>) -> String {
        let qmp = qmp.map(|path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned()));
        qmp.map_or_else(|| sockets.to_owned(), |qmp| format!("{sockets}{QMP}{}", qmp.display()))
    }
}

/// Between the two paths.
const QMP: &str = " qmp=";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_contact_is_read_as_it_was_announced() {
        let read = |line: String| {
            Contact::of(&LockHolder { process: Some(1), contact: Some(line) }).map(|contact| contact.qmp)
        };
        assert_eq!(read(Contact::line("/run/sterna", None)), Some(None));
        let qmp = Path::new("/run/tern.qmp");
        assert_eq!(read(Contact::line("/run/sterna", Some(qmp))), Some(Some(qmp.to_owned())));
        assert_eq!(Contact::of(&LockHolder::default()), None);
    }
}
