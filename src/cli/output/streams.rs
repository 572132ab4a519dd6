//! Lines on stdout and stderr. Output that fails is lost: it never ends or delays a process that holds a
//! guest.

use std::fmt::Arguments;
use std::io::{self, Write};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// As `println!`, and never panics.
macro_rules! outln {
    ($($format:tt)*) => { $crate::cli::output::streams::out(format_args!($($format)*)) };
}

/// As `eprintln!`, and never panics.
macro_rules! errln {
    ($($format:tt)*) => { $crate::cli::output::streams::err(format_args!($($format)*)) };
}

pub(crate) use {errln, outln};

/// Writes a line to stdout.
pub(crate) fn out(text: Arguments<'_>) {
    write(Stream::Out, format!("{text}\n").into_bytes());
}

/// Writes a line to stderr.
pub(crate) fn err(text: Arguments<'_>) {
    write(Stream::Err, format!("{text}\n").into_bytes());
}

/// The destination of the log: stderr, one line a write.
#[derive(Debug)]
pub(crate) struct Log;

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        write(Stream::Err, line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Clone, Copy, Debug)]
enum Stream {
    Out,
    Err,
}

/// The queues of both streams, once this process must not wait for their readers.
static QUEUES: OnceLock<[Queue; 2]> = OnceLock::new();

/// Lines for one stream, written by a thread of its own.
type Queue = SyncSender<Entry>;

#[derive(Debug)]
enum Entry {
    Line(Vec<u8>),
    /// All entries before this one are written.
    Mark(Sender<()>),
}

/// How many lines wait for a slow reader; further lines are lost.
const LINES_MAX: usize = 1024;

/// How long the end of the process waits for readers.
const FLUSH_MAX: Duration = Duration::from_secs(1);

/// From now on no write waits for its reader: a terminal that was stopped by Ctrl-S, or a full pipe, must not
/// stop a guest.
pub(crate) fn never_wait() {
    if let (Ok(out), Ok(err)) = (start(Stream::Out), start(Stream::Err)) {
        let _ = QUEUES.set([out, err]);
    }
}

fn start(stream: Stream) -> io::Result<Queue> {
    let (queue, entries): (_, Receiver<Entry>) = sync_channel(LINES_MAX);
    thread::Builder::new().name("output".into()).spawn(move || {
        for entry in entries {
            match entry {
                Entry::Line(line) => write_now(stream, &line),
                Entry::Mark(reached) => drop(reached.send(())),
            }
        }
    })?;
    Ok(queue)
}

/// Waits briefly until the readers have received the output.
pub(crate) fn flush() {
    let deadline = Instant::now() + FLUSH_MAX;
    for queue in QUEUES.get().into_iter().flatten() {
        let (reached, wait) = channel();
        // The reader of a full queue does not read.
        if queue.try_send(Entry::Mark(reached)).is_ok() {
            let _ = wait.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        }
    }
}

fn write(stream: Stream, line: Vec<u8>) {
    match QUEUES.get() {
        Some([out, err]) => {
            let queue = match stream {
                Stream::Out => out,
                Stream::Err => err,
            };
            let _ = queue.try_send(Entry::Line(line));
        }
        None => write_now(stream, &line),
    }
}

/// The reader may have gone, the disk may be full, the terminal may have hung up: no remedy exists, so the
/// error is ignored.
fn write_now(stream: Stream, line: &[u8]) {
    let _ = match stream {
        Stream::Out => {
            let mut out = io::stdout().lock();
            out.write_all(line).and_then(|()| out.flush())
        }
        Stream::Err => io::stderr().lock().write_all(line),
    };
}
