//! The output of a process, read without waiting for it.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::thread;

use rustix::io::ioctl_fionbio;

use crate::cli::output::errln;

/// The most bytes of an output that are kept and passed on; the rest is read and discarded.
pub(super) const KEPT_MAX: usize = 64 << 10;

/// The reading end of a pipe.
#[derive(Debug)]
pub(super) struct Pipe {
    file: File,
    kept: Vec<u8>,
    /// Its lines are passed on to stderr after this word.
    label: Option<&'static str>,
    /// How much of it has been passed on.
    passed_bytes: usize,
}

impl Pipe {
    pub(super) fn new(end: impl Into<OwnedFd>, label: Option<&'static str>) -> io::Result<Self> {
        let file = File::from(end.into());
        ioctl_fionbio(&file, true)?;
        Ok(Self { file, kept: Vec::new(), label, passed_bytes: 0 })
    }

    /// Reads what there is.
    pub(super) fn read_some(&mut self) -> io::Result<()> {
        // A process that writes without end must not keep the caller.
        for _ in 0..READS_MAX {
            match self.read_once() {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Goes on reading until the last process that has the other end has gone, on a thread of its own.
    pub(super) fn drain(mut self) {
        let drain = move || {
            if ioctl_fionbio(&self.file, false).is_ok() {
                while self.read_once().is_ok_and(|count| count > 0) {}
            }
        };
        if let Err(error) = thread::Builder::new().name("start-output".into()).spawn(drain) {
            tracing::warn!("the output of the started process is not read: {error}");
        }
    }

    fn read_once(&mut self) -> io::Result<usize> {
        let mut buffer = [0; 4096];
        let count = loop {
            match self.file.read(&mut buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        let room = KEPT_MAX - self.kept.len();
        self.kept.extend_from_slice(&buffer[..count.min(room)]);
        self.pass_on();
        Ok(count)
    }

    /// Passes whole lines on.
    fn pass_on(&mut self) {
        let Some(label) = self.label else { return };
        let Some(end) = self.kept[self.passed_bytes..].iter().rposition(|&byte| byte == b'\n') else {
            return;
        };
        let end = self.passed_bytes + end + 1;
        for line in String::from_utf8_lossy(&self.kept[self.passed_bytes..end]).lines() {
            errln!("{label}: {}", shown(line));
        }
        self.passed_bytes = end;
    }

    /// What was read.
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.kept).into_owned()
    }

    /// The last lines that are not empty, joined.
    pub(super) fn last_lines(&self) -> String {
        let text = self.text();
        let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).map(shown).collect();
        lines[lines.len().saturating_sub(LAST_LINES)..].join("; ")
    }
}

/// A line without control characters, and not too long for a terminal.
pub(super) fn shown(line: &str) -> String {
    let mut shown = String::new();
    for character in line.trim_end().chars().take(LINE_MAX) {
        if character.is_control() {
            shown.extend(character.escape_debug());
        } else {
            shown.push(character);
        }
    }
    shown
}

/// How many lines explain a failure.
const LAST_LINES: usize = 5;

/// The most characters of a line that are shown.
const LINE_MAX: usize = 500;

const READS_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn output_is_kept_up_to_a_limit_and_read_all_the_same() {
        let (end, mut write) = io::pipe().unwrap();
        let mut pipe = Pipe::new(end, None).unwrap();
        for _ in 0..100 {
            write.write_all(&[b'x'; 4096]).unwrap();
            pipe.read_some().unwrap();
        }
        assert_eq!(pipe.text().len(), KEPT_MAX);
    }

    #[test]
    fn the_last_lines_are_told_without_control_characters() {
        let (end, mut write) = io::pipe().unwrap();
        let mut pipe = Pipe::new(end, None).unwrap();
        write.write_all(b"1\n2\n3\n\n4\n5\n\x1b[2J6\r\nhalf").unwrap();
        pipe.read_some().unwrap();
        assert_eq!(pipe.last_lines(), "3; 4; 5; \\u{1b}[2J6; half");
        assert_eq!(shown(&"é".repeat(5000)).chars().count(), LINE_MAX);
    }
}
