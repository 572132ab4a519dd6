//! Runs a command of the operator within limits. What it starts in the background may outlive it.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

use super::pipe::Pipe;

/// The end of a command.
#[derive(Debug)]
pub(super) struct Ended {
    /// `None` if it took longer than the limit, and was killed.
    pub(super) status: Option<ExitStatus>,
    /// What it printed.
    pub(super) stdout: String,
    /// The last lines of its stderr, in one line.
    pub(super) complaint: String,
}

/// Runs the command in a process group of its own, and passes its stderr on. If it fails or takes too long,
/// its whole group is killed.
pub(super) fn run(command: &mut Command, limit: Duration) -> io::Result<Ended> {
    let deadline = Instant::now() + limit;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn()?;
    let group = Pid::from_child(&child);
    let followed = Output::of(&mut child).and_then(|mut output| {
        let succeeded = output.follow(group, deadline)?;
        Ok((succeeded, output))
    });
    if !matches!(followed, Ok((Some(true), _))) {
        // The child leads the group and is not yet waited for, so the id is still its own.
        let _ = kill_process_group(group, Signal::KILL);
    }
    let status = child.wait()?;
    let (succeeded, mut output) = followed?;
    output.read()?;
    let ended = Ended {
        status: succeeded.map(|_| status),
        stdout: output.stdout.text(),
        complaint: output.stderr.last_lines(),
    };
    // A process in the background that kept these pipes must neither stop nor break at them.
    output.stdout.drain();
    output.stderr.drain();
    Ok(ended)
}

struct Output {
    stdout: Pipe,
    stderr: Pipe,
}

impl Output {
    fn of(child: &mut Child) -> io::Result<Self> {
        let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
        let stdout = Pipe::new(child.stdout.take().ok_or_else(gone)?, None)?;
        let stderr = Pipe::new(child.stderr.take().ok_or_else(gone)?, Some("start"))?;
        Ok(Self { stdout, stderr })
    }

    /// Reads until the process ends; whether it succeeded, or `None` at the deadline. It remains to be waited
    /// for.
    fn follow(&mut self, process: Pid, deadline: Instant) -> io::Result<Option<bool>> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        loop {
            self.read()?;
            if let Some(ended) = waitid(WaitId::Pid(process), options)? {
                return Ok(Some(ended.exit_status() == Some(0)));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            thread::sleep(LOOKS_EVERY);
        }
    }

    fn read(&mut self) -> io::Result<()> {
        self.stdout.read_some()?;
        self.stderr.read_some()
    }
}

const LOOKS_EVERY: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// No test waits so long.
    const LONG: Duration = Duration::from_secs(120);

    fn shell(script: &str, limit: Duration) -> Ended {
        run(Command::new("sh").args(["-c", script]), limit).unwrap()
    }

    #[test]
    fn what_a_command_prints_and_complains_of_is_known_at_its_end() {
        let ended = shell("echo out; echo first >&2; echo second >&2; exit 3", LONG);
        assert_eq!(ended.status.unwrap().code(), Some(3));
        assert_eq!((ended.stdout.as_str(), ended.complaint.as_str()), ("out\n", "first; second"));
    }

    #[test]
    fn a_process_in_the_background_delays_nothing_and_may_write_on() {
        let folder = tempfile::tempdir().unwrap();
        let (go, done) = (folder.path().join("go"), folder.path().join("done"));
        let script = format!(
            "(until [ -e {go} ]; do sleep 0.02; done; echo more; echo more >&2; echo > {done}) & echo path",
            go = go.display(),
            done = done.display()
        );
        let ended = shell(&script, LONG);
        assert!(ended.status.unwrap().success());
        assert_eq!(ended.stdout, "path\n");
        fs::write(go, "").unwrap();
        let deadline = Instant::now() + LONG;
        while !done.exists() {
            assert!(Instant::now() < deadline, "the process broke at its pipes");
            thread::sleep(LOOKS_EVERY);
        }
    }

    #[test]
    fn a_command_that_fails_or_takes_too_long_is_killed_with_all_that_it_started() {
        for (script, limit) in [("wait", Duration::from_millis(300)), ("exit 1", LONG)] {
            let folder = tempfile::tempdir().unwrap();
            let id = folder.path().join("id");
            let script = format!("sleep 600 & echo $! > {}; {script}", id.display());
            let ended = shell(&script, limit);
            assert!(ended.status.is_none_or(|status| !status.success()));
            let started = fs::read_to_string(id).unwrap();
            let deadline = Instant::now() + LONG;
            // Killed, and perhaps not yet waited for by the process that inherited it.
            let lives = || {
                let stat = fs::read_to_string(format!("/proc/{}/stat", started.trim())).unwrap_or_default();
                stat.contains("(sleep)") && !stat.contains(") Z")
            };
            while lives() {
                assert!(Instant::now() < deadline, "it lives on after {script}");
                thread::sleep(LOOKS_EVERY);
            }
        }
    }

    #[test]
    fn a_command_that_prints_without_end_is_killed_and_costs_little() {
        let ended = shell("exec yes", Duration::from_millis(200));
        assert!(ended.status.is_none());
        assert!(ended.stdout.len() <= super::super::pipe::KEPT_MAX);
    }
}
