//! Reads the stream of a source QEMU to its end: a thread for each channel.
//!
//! The bytes of pages are discarded in the kernel. The threads end with the stream, or when
//! [`abort`](Drain::abort) cuts it.

mod acceptor;
mod channel;
mod discard;
pub(crate) mod listener;

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::multifd::{ChannelError, ChannelPages, Channels, ChannelsError, Dialect};
use crate::names::SharedBlock;
use crate::page::Marks;
use crate::stream::{self, Blob, Expected, Stage, StreamError, Watch};
use crate::tracker::Tracker;
use acceptor::Acceptor;
use channel::Channel;
use listener::Listener;

/// What a stream must have, and its bounds.
#[derive(Clone, Debug)]
pub(crate) struct Bounds {
    pub(crate) shared: Vec<SharedBlock>,
    /// The machine type with its version.
    pub(crate) machine: String,
    pub(crate) unshared_max_bytes: u64,
    pub(crate) state_max_bytes: u64,
}

/// The threads that read a stream.
#[derive(Debug)]
pub(crate) struct Drain {
    shared: Arc<Shared>,
    /// The main channel's result.
    blob: Mutex<Receiver<Result<Blob, StreamError>>>,
    /// The ends of the multifd channels, and how many there are.
    ends: Mutex<Receiver<Result<(), ChannelError>>>,
    channels: usize,
}

/// What the threads of all channels share.
#[derive(Debug)]
struct Shared {
    bounds: Bounds,
    tracker: Arc<Tracker>,
    /// The multifd channels.
    channels: Channels,
    total_bytes: Arc<AtomicU64>,
    /// All sockets, to be cut; `None` once they are.
    sockets: Mutex<Option<Vec<UnixStream>>>,
}

/// Why there is no blob.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DrainError {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("QEMU sent nothing for {} s", silence.as_secs())]
    Silent { silence: Duration },
    #[error("QEMU's stream was not read to its end: {0}")]
    Ended(String),
}

impl Drain {
    /// Reads a stream of a main channel and several multifd channels, which QEMU, and no other process,
    /// connects to this listener.
    pub(crate) fn of_listener(
        (listener, process): (Listener, i32),
        (channels, dialect): (usize, Dialect),
        bounds: Bounds,
        tracker: Arc<Tracker>,
    ) -> io::Result<Self> {
        let ((sender, blob), (ended, ends)) = (mpsc::channel(), mpsc::channel());
        let multifd = Channels::new(channels, dialect, &bounds.shared, bounds.unshared_max_bytes);
        let shared = Shared::new(bounds, tracker, multifd);
        let acceptor = Acceptor { listener, process, channels };
        let accepting = Arc::clone(&shared);
        thread::Builder::new().name("qemu-accept".into()).spawn(move || {
            let connected = |socket, is_main| match is_main {
                true => accepting.spawn_main(socket, sender.clone()),
                false => accepting.spawn_multifd(socket, ended.clone()),
            };
            if let Err(error) = acceptor.accept_all(connected) {
                accepting.fail(&format!("QEMU does not connect its channels: {error}"));
            }
        })?;
        Ok(Self { shared, blob: Mutex::new(blob), ends: Mutex::new(ends), channels })
    }

    /// Cuts the stream. The threads end.
    pub(crate) fn abort(&self) {
        self.shared.fail("the migration was given up");
    }

    /// Waits for the end of the stream, of all its channels; returns what the destination QEMU shall load. No
    /// page is named any more then.
    ///
    /// # Errors
    /// [`DrainError`], also if QEMU sends nothing for as long as `silence`.
    pub(crate) fn finish(&self, silence: Duration) -> Result<Blob, DrainError> {
        let mut before = (self.total_bytes(), Instant::now());
        let blob = self.blob.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match blob.recv_timeout(LOOKS_EVERY) {
                Ok(blob) => {
                    let blob = blob?;
                    self.await_channels(silence)?;
                    return Ok(blob);
                }
                Err(RecvTimeoutError::Disconnected) => return Err(DrainError::Ended(self.shared.failure())),
                Err(RecvTimeoutError::Timeout) => {}
            }
            let now = self.total_bytes();
            if now != before.0 {
                before = (now, Instant::now());
            } else if before.1.elapsed() > silence {
                return Err(DrainError::Silent { silence });
            }
        }
    }

    /// A channel with pages after its last SYNC packet fails at its end.
    fn await_channels(&self, silence: Duration) -> Result<(), DrainError> {
        let ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..self.channels {
            match ends.recv_timeout(silence) {
                Ok(ended) => ended?,
                Err(RecvTimeoutError::Disconnected) => return Err(DrainError::Ended(self.shared.failure())),
                Err(RecvTimeoutError::Timeout) => return Err(DrainError::Silent { silence }),
            }
        }
        Ok(())
    }

    /// How many bytes have been read or discarded.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.shared.total_bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Drain {
    fn drop(&mut self) {
        self.abort();
    }
}

impl Shared {
    fn new(bounds: Bounds, tracker: Arc<Tracker>, channels: Channels) -> Arc<Self> {
        let (total_bytes, sockets) = (Arc::default(), Mutex::new(Some(Vec::new())));
        Arc::new(Self { bounds, tracker, channels, total_bytes, sockets })
    }

    fn spawn_main(
        self: &Arc<Self>,
        socket: UnixStream,
        sender: Sender<Result<Blob, StreamError>>,
    ) -> io::Result<()> {
        let mut channel = self.channel(socket)?;
        let shared = Arc::clone(self);
        thread::Builder::new().name("qemu-stream".into()).spawn(move || {
            let blob = shared.read_main(&mut channel);
            if let Err(error) = &blob {
                shared.fail(&error.to_string());
            }
            // Without a receiver the stream was cut.
            let _ = sender.send(blob);
        })?;
        Ok(())
    }

    fn spawn_multifd(
        self: &Arc<Self>,
        socket: UnixStream,
        ended: Sender<Result<(), ChannelError>>,
    ) -> io::Result<()> {
        let mut channel = self.channel(socket)?;
        let shared = Arc::clone(self);
        thread::Builder::new().name("qemu-multifd".into()).spawn(move || {
            let read = shared.channels.read(&mut channel, &*shared.tracker);
            if let Err(error) = &read {
                shared.fail(&error.to_string());
            }
            // Without a receiver the stream was cut.
            let _ = ended.send(read);
        })?;
        Ok(())
    }

    /// The reading end of a socket, which is cut with all others.
    fn channel(&self, socket: UnixStream) -> io::Result<Channel> {
        match &mut *self.sockets() {
            Some(sockets) => sockets.push(socket.try_clone()?),
            None => return Err(io::ErrorKind::ConnectionAborted.into()),
        }
        Channel::new(socket, Arc::clone(&self.tracker), Arc::clone(&self.total_bytes))
    }

    fn read_main(&self, channel: &mut Channel) -> Result<Blob, StreamError> {
        let Bounds { shared, machine, unshared_max_bytes, state_max_bytes } = &self.bounds;
        let expected = Expected {
            shared,
            machine: Some(machine),
            unshared_max_bytes: *unshared_max_bytes,
            state_max_bytes: *state_max_bytes,
        };
        stream::read(channel, &expected, &*self.tracker, &mut Ends(self))
    }

    /// The stream is of no use any more: no thread reads on.
    fn fail(&self, reason: &str) {
        self.tracker.fail(reason);
        let sockets = self.sockets().take();
        for socket in sockets.iter().flatten() {
            // It may have ended already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    fn failure(&self) -> String {
        self.tracker.failure().unwrap_or_else(|| "its reader has ended: a defect of Sterna".into())
    }

    fn sockets(&self) -> MutexGuard<'_, Option<Vec<UnixStream>>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Watches for the end of RAM.
struct Ends<'stream>(&'stream Shared);

impl Watch for Ends<'_> {
    fn reached(&mut self, stage: Stage, _: Marks) {
        match stage {
            // From this stage QEMU's monitor hangs unless the stream is read.
            Stage::RamEnd => self.0.tracker.open(),
            Stage::RamComplete => self.0.tracker.named_all(),
            _ => {}
        }
    }

    fn finish_channels(&mut self, marks: Marks) -> Result<ChannelPages, ChannelsError> {
        self.0.channels.finish(marks, SILENCE_MAX)
    }
}

/// How long a multifd channel may be silent while its last packets are awaited.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// How often a waiting thread looks whether bytes still arrive.
const LOOKS_EVERY: Duration = Duration::from_millis(100);
