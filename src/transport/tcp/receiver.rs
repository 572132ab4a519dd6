//! The destination's end of all TCP streams.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use zerocopy::{FromZeros, IntoBytes};

use super::encrypted::receive_decrypted;
use super::stall::{STALL_MAX, broken};
use crate::control::{PeerLiveness, ProtectedStream, tune};
use crate::memory::{GuestRam, receive_into};
use crate::panics::caught_or;
use crate::poison::IgnorePoison;
use crate::transport::error::TransportError;
use crate::transport::receiver::{LaneConnection, LaneConnections, LaneReceiver};
use crate::transport::remains::Remains;
use crate::wire::{FRAME_BYTES_MAX, PageFrame, RUNS_MAX, Token, WireError, WireRun};

/// The longest sleep between two checks whether the source is still connected.
const NAP_MAX: Duration = Duration::from_millis(50);

/// One thread a lane that reads frames into guest RAM until the lane is closed.
#[derive(Debug)]
pub(crate) struct TcpReceiver {
    token: Token,
    ram: GuestRam,
    lanes: Vec<Option<Reader>>,
    fences: Arc<Fences>,
    /// How long to wait for the fences of a round.
    patience: Duration,
    /// How long ending as many streams took, the quicker of two times.
    revoke_time: Duration,
    liveness: PeerLiveness,
}

#[derive(Debug)]
struct Reader {
    stream: TcpStream,
    thread: JoinHandle<()>,
}

impl TcpReceiver {
    /// A lane receiver for `lanes` lanes that have yet to connect, and that end with the control channel of
    /// this liveness.
    pub(crate) fn new(lanes: u8, ram: &GuestRam, liveness: PeerLiveness) -> Result<Self, TransportError> {
        let mut token = Token([0; 16]);
        getrandom::fill(&mut token.0).map_err(TransportError::Random)?;
        let revoke_time = revoke_time(lanes).min(revoke_time(lanes));
        let lanes: Vec<_> = (0..lanes).map(|_| None).collect();
        let (ram, fences) = (ram.clone(), Arc::new(Fences::new(lanes.len())));
        Ok(Self { token, ram, lanes, fences, patience: STALL_MAX, revoke_time, liveness })
    }

    /// The same with this limit on the wait for the fences of a round.
    #[cfg(test)]
    pub(crate) fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Takes a connection if it is one of the missing lanes.
    fn take(&mut self, LaneConnection { lane, stream, .. }: LaneConnection) -> Result<(), String> {
        let index = usize::from(lane);
        if !matches!(self.lanes.get(index), Some(None)) {
            return Err("it belongs to no lane of this migration".into());
        }
        let socket = stream.socket();
        let reader = tune(socket)
            .and_then(|()| socket.set_read_timeout(None))
            .and_then(|()| self.liveness.shut_with(socket))
            .and_then(|()| socket.set_write_timeout(Some(STALL_MAX)))
            .and_then(|()| socket.try_clone())
            .and_then(|socket| {
                let (ram, fences) = (self.ram.clone(), self.fences.clone());
                let name = format!("tcp-lane-{lane}");
                let thread = thread::Builder::new().name(name).spawn(move || {
                    let mut frames = Frames { lane: index, stream, ram, fences };
                    if let Err(error) = caught_or(|| frames.read_all()) {
                        frames.fences.fail(error);
                        // The source must not wait for this lane. It may have closed it itself.
                        let _ = frames.stream.socket().shutdown(Shutdown::Both);
                    }
                })?;
                Ok(Reader { stream: socket, thread })
            });
        self.lanes[index] = Some(reader.map_err(|error| error.to_string())?);
        Ok(())
    }
}

impl LaneReceiver for TcpReceiver {
    fn ready(&self) -> Result<Vec<u8>, TransportError> {
        Ok(self.token.0.to_vec())
    }

    fn token(&self) -> Option<Token> {
        Some(self.token)
    }

    fn connect(&mut self, connections: &dyn LaneConnections) -> Result<(), TransportError> {
        let deadline = Instant::now() + STALL_MAX;
        while let Some(lane) = self.lanes.iter().position(Option::is_none) {
            // A source that has gone connects no more lanes.
            self.liveness.check()?;
            self.liveness.check_not_interrupted()?;
            let connection = connections.connection_within(NAP_MAX).map_err(|error| broken(lane, error))?;
            match connection {
                Some(connection) => {
                    let from = connection.from;
                    if let Err(reason) = self.take(connection) {
                        tracing::warn!("a connection from {from} was closed: {reason}");
                    }
                }
                None if Instant::now() < deadline => {}
                None => return Err(broken(lane, io::ErrorKind::WouldBlock.into())),
            }
        }
        Ok(())
    }

    fn await_round(&mut self, round: u32) -> Result<(), TransportError> {
        self.fences.wait(round, self.patience)
    }

    fn revoke_time(&self) -> Duration {
        self.revoke_time
    }

    /// Closes the connections and waits for their threads, the only writers of guest RAM.
    fn revoke(self: Box<Self>) -> Result<Box<dyn Remains>, TransportError> {
        drop(self);
        Ok(Box::new(()))
    }
}

impl Drop for TcpReceiver {
    fn drop(&mut self) {
        let readers = self.lanes.drain(..).flatten().map(|Reader { stream, thread }| (stream, thread));
        // An error means that the peer was faster.
        end_all(readers.collect(), |stream| drop(stream.shutdown(Shutdown::Both)));
    }
}

/// Ends streams, and waits for the threads that read them.
fn end_all<S>(readers: Vec<(S, JoinHandle<()>)>, end: impl Fn(&S)) {
    readers.iter().for_each(|(stream, _)| end(stream));
    for (_, thread) in readers {
        let _ = thread.join();
    }
}

/// How long ending this many streams with a thread each takes, measured with unconnected streams. Streams
/// that the system refuses are left out: the lanes would fail, too.
fn revoke_time(lanes: u8) -> Duration {
    let reader = |_| {
        let (ours, theirs) = UnixStream::pair()?;
        let reading = theirs.try_clone()?;
        let thread = thread::Builder::new().name("tcp-probe".into()).spawn(move || {
            let _ = (&theirs).write_all(&[0]);
            let _ = (&theirs).read(&mut [0]);
        })?;
        (&ours).read_exact(&mut [0])?;
        Ok((reading, thread))
    };
    let readers: Vec<_> = (0..lanes).map(reader).filter_map(|made: io::Result<_>| made.ok()).collect();
    let began = Instant::now();
    end_all(readers, |stream| drop(stream.shutdown(Shutdown::Both)));
    began.elapsed()
}

/// Reads the frames of one lane.
struct Frames {
    lane: usize,
    stream: ProtectedStream,
    ram: GuestRam,
    fences: Arc<Fences>,
}

impl Frames {
    fn read_all(&mut self) -> Result<(), TransportError> {
        let mut runs = vec![WireRun::new_zeroed(); RUNS_MAX];
        let mut frame = PageFrame::new_zeroed();
        self.stream.read_exact(frame.as_mut_bytes()).map_err(|error| broken(self.lane, error))?;
        loop {
            if let Some(round) = frame.fenced_round() {
                self.fences.seen(self.lane, round);
                self.stream.write_all(&round.to_le_bytes()).map_err(|error| broken(self.lane, error))?;
                self.stream.read_exact(frame.as_mut_bytes()).map_err(|error| broken(self.lane, error))?;
                continue;
            }
            let runs = &mut runs[..frame.runs()?];
            self.stream.read_exact(runs.as_mut_bytes()).map_err(|error| broken(self.lane, error))?;
            let (mut slices, mut bytes) = (Vec::with_capacity(runs.len()), 0);
            for run in runs {
                let run = run.decode()?;
                bytes += run.len_bytes();
                slices.push(self.ram.slice(run)?);
            }
            if bytes > FRAME_BYTES_MAX {
                let [len, max] =
                    [bytes, FRAME_BYTES_MAX].map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
                return Err(WireError::TooLong { what: "a frame of pages", len, max }.into());
            }
            // Reads the next frame's head, too, for which this thread would otherwise wake up again: one
            // always follows, at least the fence's.
            let next = frame.as_mut_bytes();
            match &mut self.stream {
                ProtectedStream::Plain(stream) => receive_into(stream.as_fd(), &slices, next),
                ProtectedStream::Tls(stream) => receive_decrypted(stream, &slices, next),
            }
            .map_err(|error| broken(self.lane, error))?;
        }
    }
}

/// The round that each lane has closed, and the first failure.
#[derive(Debug)]
struct Fences {
    state: Mutex<FenceState>,
    changed: Condvar,
}

#[derive(Debug)]
struct FenceState {
    rounds: Vec<Option<u32>>,
    failure: Option<TransportError>,
}

impl Fences {
    fn new(lanes: usize) -> Self {
        Self {
            state: Mutex::new(FenceState { rounds: vec![None; lanes], failure: None }),
            changed: Condvar::new(),
        }
    }

    fn seen(&self, lane: usize, round: u32) {
        self.state.lock().ignore_poison().rounds[lane] = Some(round);
        self.changed.notify_all();
    }

    fn fail(&self, error: TransportError) {
        self.state.lock().ignore_poison().failure.get_or_insert(error);
        self.changed.notify_all();
    }

    fn wait(&self, round: u32, patience: Duration) -> Result<(), TransportError> {
        let state = self.state.lock().ignore_poison();
        // A later fence counts too: the source may be a round ahead of its messages on the control channel.
        let missing = |seen: &Option<u32>| *seen < Some(round);
        let pending = |state: &mut FenceState| state.failure.is_none() && state.rounds.iter().any(missing);
        let (mut state, timeout) = self.changed.wait_timeout_while(state, patience, pending).ignore_poison();
        if !state.rounds.iter().any(missing) {
            return Ok(());
        }
        if let Some(failure) = state.failure.take() {
            return Err(failure);
        }
        if timeout.timed_out() {
            let lane = state.rounds.iter().position(missing).unwrap_or(0);
            return Err(TransportError::Stalled { lane, silence: patience });
        }
        Ok(())
    }
}
