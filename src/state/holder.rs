//! The process that has a guest, as the state file's head names it.

use std::fmt;
use std::process;

/// The longest text of a holder, in bytes.
pub(super) const HOLDER_LEN: usize = 2048;

/// The process that has a guest, according to its state file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LockHolder {
    /// Its process id, in its own PID namespace.
    pub process: Option<u32>,
    /// How to reach it, as it announced.
    pub contact: Option<String>,
}

impl LockHolder {
    pub(super) fn of_this_process() -> Self {
        Self { process: Some(process::id()), contact: None }
    }

    /// Two lines, padded with zeros.
    pub(super) fn encode(&self) -> [u8; HOLDER_LEN] {
        let mut bytes = [0; HOLDER_LEN];
        let contact = self.contact.as_deref().unwrap_or_default();
        let text = format!("{}\n{contact}\n", self.process.unwrap_or_default());
        // A contact that does not fit is left out whole.
        if text.len() <= HOLDER_LEN && !contact.contains('\n') {
            bytes[..text.len()].copy_from_slice(text.as_bytes());
        }
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let mut lines = text.lines();
        let process = lines.next().and_then(|line| line.parse().ok()).filter(|&process| process > 0);
        let contact = lines.next().filter(|line| !line.is_empty() && !line.contains(char::is_control));
        Self { process, contact: contact.map(str::to_owned) }
    }
}

impl fmt::Display for LockHolder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.process.map_or(Ok(()), |process| write!(formatter, ", process {process},"))
    }
}
