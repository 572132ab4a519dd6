//! Other programs: starting them, waiting for them, and ending them on drop.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::net::{IpAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::failure::Failure;

/// The interval for polling a condition without an event. The machine may have one processor, which the
/// measurement needs.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How much of a program's output is read.
const OUTPUT_MAX: u64 = 1 << 20;

/// How much of the output is quoted.
const QUOTE_MAX: usize = 300;

/// A running program; dropping this value ends it.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    exit: OwnedFd,
    what: String,
    output: File,
}

impl Running {
    /// Starts a program of a package. Its standard input stays open as long as this value lives; its output
    /// is kept.
    pub(crate) fn start(
        command: &mut Command,
        program: &'static str,
        package: &'static str,
    ) -> Result<Self, Failure> {
        let failed = || Failure::system(format!("start {program}"));
        let output = tempfile::tempfile().map_err(failed())?;
        let (out, err) = (output.try_clone().map_err(failed())?, output.try_clone().map_err(failed())?);
        let started = command.stdin(Stdio::piped()).stdout(out).stderr(err).spawn();
        let mut child = started.map_err(|error| match error.kind() {
            ErrorKind::NotFound => Failure::Missing { program, package },
            _ => failed()(error),
        })?;
        let exit = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).map_err(|error| {
            let _ = child.kill();
            let _ = child.wait();
            failed()(error.into())
        })?;
        Ok(Self { child, exit, what: program.to_owned(), output })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end, which has to be a success; returns its output.
    pub(crate) fn succeed(mut self, limit: Duration) -> Result<String, Failure> {
        let status = self.end(limit)?;
        if status.success() { Ok(self.said()) } else { Err(self.ended(status)) }
    }

    /// Waits for its end.
    pub(crate) fn end(&mut self, limit: Duration) -> Result<ExitStatus, Failure> {
        let seconds = i64::try_from(limit.as_secs()).unwrap_or(i64::MAX);
        let limit_spec = Timespec { tv_sec: seconds, tv_nsec: limit.subsec_nanos().into() };
        let failed = || Failure::system(format!("wait for {}", self.what));
        let mut exit = [PollFd::new(&self.exit, PollFlags::IN)];
        if poll(&mut exit, Some(&limit_spec)).map_err(|error| failed()(error.into()))? == 0 {
            return Err(self.late("end", limit));
        }
        let failed = Failure::system(format!("wait for {}", self.what));
        self.child.wait().map_err(failed)
    }

    /// Polls until `is_so` returns a value; fails if the program ends first.
    pub(crate) fn until<T>(
        &mut self,
        doing: &'static str,
        limit: Duration,
        mut is_so: impl FnMut(&mut Self) -> Result<Option<T>, Failure>,
    ) -> Result<T, Failure> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(so) = is_so(self)? {
                return Ok(so);
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(self.ended(status));
            }
            if Instant::now() >= deadline {
                return Err(self.late(doing, limit));
            }
            thread::sleep(LOOK_EVERY);
        }
    }

    /// Waits until it listens at a TCP port of this machine.
    pub(crate) fn until_listening(&mut self, port: u16) -> Result<(), Failure> {
        self.until("listen", Duration::from_secs(20), |_| Ok(listens(port).then_some(())))
    }

    /// Its output so far, on both streams.
    pub(crate) fn said(&mut self) -> String {
        let mut bytes = Vec::new();
        let reading = self.output.seek(SeekFrom::Start(0)).and_then(|_| {
            let read = Read::by_ref(&mut self.output).take(OUTPUT_MAX).read_to_end(&mut bytes);
            // The program shares the file's position.
            self.output.seek(SeekFrom::End(0))?;
            read
        });
        match reading {
            Ok(_) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) => format!("(its output cannot be read: {error})"),
        }
    }

    pub(crate) fn ended(&mut self, status: ExitStatus) -> Failure {
        Failure::Ended { what: self.what.clone(), status, said: quote(&self.said()) }
    }

    pub(crate) fn late(&mut self, doing: &'static str, limit: Duration) -> Failure {
        Failure::Late { what: self.what.clone(), doing, limit, said: quote(&self.said()) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The end of a program's output, in one line: an error is usually last.
pub(crate) fn quote(said: &str) -> String {
    let words: Vec<&str> = said.split_whitespace().collect();
    let line = words.join(" ");
    let skipped = line.chars().count().saturating_sub(QUOTE_MAX);
    let end: String = line.chars().skip(skipped).collect();
    if skipped > 0 { format!("… {end}") } else { end }
}

/// An unused TCP port of this address.
pub(crate) fn free_port(address: IpAddr) -> Result<u16, Failure> {
    TcpListener::bind((address, 0))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(Failure::system(format!("listen at {address}")))
}

fn listens(port: u16) -> bool {
    ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .any(|table| fs::read_to_string(table).is_ok_and(|table| has_listener(&table, port)))
}

/// proc(5): the second word of a line is the local address as hexadecimal ADDRESS:PORT, the fourth the state,
/// 0A for a listener.
fn has_listener(table: &str, port: u16) -> bool {
    let port = format!(":{port:04X}");
    table.lines().any(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        words.next().is_some_and(|local| local.ends_with(&port)) && words.nth(1) == Some("0A")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_listener_of_that_port_counts() {
        let table = "  sl  local_address rem_address   st\n\
                     0: 01014D0A:1F90 00000000:0000 0A 0\n\
                     1: 01014D0A:0050 00000000:1F91 01 0\n";
        assert!(has_listener(table, 0x1f90));
        assert!(!has_listener(table, 0x50), "connected, not listening");
        assert!(!has_listener(table, 0x1f91), "the peer's port");
    }

    #[test]
    fn the_end_of_what_was_said_is_quoted() {
        assert_eq!(quote("  a \n b\n"), "a b");
        let long = quote(&format!("begin {} end", "x".repeat(1000)));
        assert!(long.starts_with('…') && long.ends_with(" end") && long.chars().count() < 310, "{long}");
    }

    #[test]
    fn a_program_that_is_not_there_is_told_by_its_package() {
        let error =
            Running::start(&mut Command::new("/does/not/exist"), "ib_write_bw", "perftest").unwrap_err();
        assert_eq!(error.to_string(), "ib_write_bw is not installed: `apt install perftest`");
    }

    #[test]
    fn what_a_program_said_and_how_it_ended_is_told() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo hello; echo trouble >&2; exit 3"]);
        let running = Running::start(&mut command, "sh", "dash").unwrap();
        let error = running.succeed(Duration::from_secs(20)).unwrap_err().to_string();
        assert!(error.contains("hello trouble") && error.contains('3'), "{error}");
    }

    #[test]
    fn nothing_is_waited_for_without_end() {
        let mut command = Command::new("sleep");
        let mut running = Running::start(command.arg("1000"), "sleep", "coreutils").unwrap();
        assert!(matches!(running.end(Duration::from_millis(10)), Err(Failure::Late { .. })));
    }
}
