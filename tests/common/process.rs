//! A child process that ends with the test; its output is read as it comes.

#![expect(unsafe_code, reason = "kill(2)")]

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use serde_json::Value;

use super::{PATIENCE, wait_until};

/// A process of the `sterna` command in its own process group; dropping this value kills it.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    what: String,
    stdout: Lines,
    stderr: Lines,
}

/// A process that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Its exit code; `None` if a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) signal: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Process {
    pub(crate) fn start(mut command: Command) -> Self {
        let what = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("{what} does not start: {error}"));
        let stdout = Lines::read(child.stdout.take().expect("it was piped"));
        let stderr = Lines::read(child.stderr.take().expect("it was piped"));
        Self { child, what, stdout, stderr }
    }

    pub(crate) fn id(&self) -> i32 {
        i32::try_from(self.child.id()).expect("process ids are positive i32")
    }

    /// Takes away its right to lock more memory than a page.
    pub(crate) fn may_lock_no_more(&self) {
        let pid = format!("--pid={}", self.id());
        let status =
            Command::new("prlimit").args([&pid, "--memlock=4096"]).status().expect("util-linux's prlimit");
        assert!(status.success(), "{status}");
    }

    pub(crate) fn signal(&self, signal: i32) {
        // SAFETY: the call accesses no memory. The process is this process's child and not yet waited for, so
        // the id is still its own.
        let result = unsafe { libc::kill(self.id(), signal) };
        assert_eq!(result, 0, "kill: {}", std::io::Error::last_os_error());
    }

    /// The first event with this name on its stdout.
    pub(crate) fn event(&self, name: &str) -> Value {
        let is_it =
            |line: &str| serde_json::from_str::<Value>(line).is_ok_and(|event| event["event"] == name);
        let line = self.stdout.wait_for(is_it).unwrap_or_else(|| self.did_not(&format!("say `{name}`")));
        serde_json::from_str(&line).expect("it was read before")
    }

    /// Whether it has printed an event with this name on stdout.
    pub(crate) fn has_said(&self, name: &str) -> bool {
        let text = self.stdout.text();
        let mut events = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        events.any(|event| event["event"] == name)
    }

    /// Waits for a line with this text on stderr.
    pub(crate) fn says(&self, text: &str) {
        self.says_a_line(&format!("with `{text}`"), |line| line.contains(text));
    }

    /// Waits for such a line on stderr.
    pub(crate) fn says_a_line(&self, what: &str, is_it: impl Fn(&str) -> bool) {
        if self.stderr.wait_for(is_it).is_none() {
            self.did_not(&format!("say a line {what}"));
        }
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("it is our child").is_some()
    }

    /// Waits for its end.
    pub(crate) fn wait(mut self) -> Ended {
        let mut status = None;
        wait_until(&format!("{} ends", self.what), || {
            status = self.child.try_wait().expect("it is our child");
            status.is_some()
        });
        let status = status.expect("it was waited for");
        Ended {
            code: status.code(),
            signal: status.signal(),
            stdout: self.stdout.rest(),
            stderr: self.stderr.rest(),
        }
    }

    fn did_not(&self, what: &str) -> ! {
        panic!("{} did not {what}; it said:\n{}\n{}", self.what, self.stdout.text(), self.stderr.text())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        // The group: a process that the test abandons may have children. SAFETY: the call accesses no memory.
        // The child leads the group and is not yet waited for, so the id is still its own.
        unsafe { libc::kill(-self.id(), libc::SIGKILL) };
        let _ = self.child.wait();
    }
}

impl Ended {
    /// Asserts the exit code; a failure shows all output.
    #[track_caller]
    pub(crate) fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        self
    }

    /// The JSON object in the last line of stdout.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        let last = self.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {self:#?}"))
    }

    #[track_caller]
    pub(crate) fn says(&self, text: &str) -> &Self {
        assert!(self.stderr.contains(text), "`{text}` is not in {}", self.stderr);
        self
    }
}

/// The lines of a stream, read as they come.
#[derive(Debug)]
struct Lines {
    shared: Arc<(Mutex<Heard>, Condvar)>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Heard {
    lines: Vec<String>,
    ended: bool,
}

impl Lines {
    fn read(stream: impl Read + Send + 'static) -> Self {
        let shared = Arc::<(Mutex<Heard>, Condvar)>::default();
        let writing = shared.clone();
        let reader = thread::spawn(move || {
            let (heard, changed) = &*writing;
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                lock(heard).lines.push(line);
                changed.notify_all();
            }
            lock(heard).ended = true;
            changed.notify_all();
        });
        Self { shared, reader: Some(reader) }
    }

    fn wait_for(&self, is_it: impl Fn(&str) -> bool) -> Option<String> {
        let deadline = Instant::now() + PATIENCE;
        let (heard, changed) = &*self.shared;
        let mut heard = lock(heard);
        loop {
            if let Some(line) = heard.lines.iter().find(|line| is_it(line)) {
                return Some(line.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if heard.ended || left.is_zero() {
                return None;
            }
            heard = changed.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// All lines so far.
    fn text(&self) -> String {
        lock(&self.shared.0).lines.join("\n")
    }

    /// All lines of a process that has ended.
    fn rest(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            reader.join().expect("reading lines does not panic");
        }
        self.text()
    }
}

fn lock(heard: &Mutex<Heard>) -> MutexGuard<'_, Heard> {
    heard.lock().unwrap_or_else(PoisonError::into_inner)
}
