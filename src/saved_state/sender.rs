//! The source's end: the VMM writes, one thread hashes and another sends.

use std::io::{self, ErrorKind, Write};
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};

use zerocopy::IntoBytes;

use crate::control::{ControlError, FrameSender};
use crate::convergence::STATE_HELD_MAX;
use crate::wire::{FRAME_HEAD_LEN, FrameHead, Message, STATE_FRAME_MAX};

/// The number of frames between the VMM and the connection.
const FRAMES: usize = STATE_HELD_MAX / STATE_FRAME_MAX;

/// The offset at which the bytes of a frame end.
const BYTES_END: usize = FRAME_HEAD_LEN + STATE_FRAME_MAX;

/// Takes a state as the VMM writes it. A write waits while all buffers are in use.
#[derive(Debug)]
pub(crate) struct StateSender {
    max_bytes: u64,
    written: u64,
    /// How much the VMM tried to write in total, if that exceeds the limit.
    too_long: Option<u64>,
    /// Whether the connection has failed.
    cut: bool,
    /// The frame being filled; without a buffer before the first byte and after a full frame.
    frame: Vec<u8>,
    spare: Receiver<Vec<u8>>,
    full: Sender<Vec<u8>>,
    sending: Sending,
}

/// The threads, which run until the sender is closed or the attempt is over.
#[derive(Debug)]
struct Sending {
    /// `None` once it was joined.
    thread: Option<JoinHandle<Result<(), ControlError>>>,
    over: Arc<AtomicBool>,
}

impl StateSender {
    /// Starts the threads, with all buffers allocated, so that no allocation remains once the guest is
    /// paused. `pace` waits until this many bytes may be sent.
    ///
    /// # Errors
    /// The system has no threads left.
    pub(crate) fn start(
        to: FrameSender,
        max_bytes: u64,
        pace: impl Fn(u64) -> Result<(), ControlError> + Send + 'static,
    ) -> io::Result<Self> {
        let (full, unhashed) = mpsc::channel::<Vec<u8>>();
        let (to_send, hashed) = mpsc::channel::<Vec<u8>>();
        let (give_back, spare) = mpsc::channel();
        for _ in 0..FRAMES {
            // Touched now, with the length of a full frame.
            let _ = give_back.send(vec![1; BYTES_END + size_of::<u64>()]);
        }
        let over = Arc::new(AtomicBool::new(false));
        thread::Builder::new().name("state-hash".into()).spawn(move || {
            for mut frame in unhashed {
                if finish(&mut frame).is_err() || to_send.send(frame).is_err() {
                    return;
                }
            }
        })?;
        let is_over = over.clone();
        let thread = thread::Builder::new().name("state-send".into()).spawn(move || {
            for frame in hashed {
                if is_over.load(Ordering::Relaxed) {
                    return Err(ControlError::Interrupted);
                }
                pace(frame.len() as u64)?;
                to.send(&frame, "State")?;
                // Fails if the VMM has written everything.
                let _ = give_back.send(frame);
            }
            Ok(())
        })?;
        let sending = Sending { thread: Some(thread), over };
        Ok(Self {
            max_bytes,
            written: 0,
            too_long: None,
            cut: false,
            frame: Vec::new(),
            spare,
            full,
            sending,
        })
    }

    /// How much the VMM tried to write at least, if that exceeds the limit.
    pub(crate) fn too_long(&self) -> Option<u64> {
        self.too_long
    }

    /// Ends the state once the VMM has written everything: sends the rest, without waiting for it.
    ///
    /// # Errors
    /// [`ControlError`] if the connection has failed.
    pub(crate) fn close(mut self) -> Result<SentState, ControlError> {
        if self.cut || !self.frame.is_empty() && self.pass_on().is_err() {
            return Err(self.sending.join().err().unwrap_or(ControlError::Interrupted));
        }
        Ok(SentState { len_bytes: self.written, sending: self.sending })
    }

    /// Whether a write failed because the connection did; [`close`](Self::close) says how.
    pub(crate) fn is_cut(&self) -> bool {
        self.cut
    }

    fn pass_on(&mut self) -> io::Result<()> {
        let mut frame = mem::take(&mut self.frame);
        let offset = self.written - (frame.len() - FRAME_HEAD_LEN) as u64;
        frame.extend(offset.to_le_bytes());
        self.full.send(frame).map_err(|_| self.cut())
    }

    fn cut(&mut self) -> io::Error {
        self.cut = true;
        io::Error::new(ErrorKind::BrokenPipe, "the connection to the destination has failed")
    }
}

impl Write for StateSender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let wanted = self.written.saturating_add(bytes.len() as u64);
        if wanted > self.max_bytes {
            self.too_long = Some(wanted);
            let limit = format!("more than {} bytes of state", self.max_bytes);
            return Err(io::Error::new(ErrorKind::FileTooLarge, limit));
        }
        if bytes.is_empty() {
            return Ok(0);
        }
        if self.frame.is_empty() {
            self.frame = self.spare.recv().map_err(|_| self.cut())?;
            self.frame.truncate(FRAME_HEAD_LEN);
        }
        let count = bytes.len().min(BYTES_END - self.frame.len());
        self.frame.extend(&bytes[..count]);
        self.written += count as u64;
        if self.frame.len() == BYTES_END {
            self.pass_on()?;
        }
        Ok(count)
    }

    /// Does nothing: frames are sent when full, and the last one at the end.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A state of which the last frames may still be on their way.
#[derive(Debug)]
pub(crate) struct SentState {
    len_bytes: u64,
    sending: Sending,
}

impl SentState {
    /// Waits until the connection has taken the whole state; returns its length.
    ///
    /// # Errors
    /// [`ControlError`] if it has not.
    pub(crate) fn wait(mut self) -> Result<u64, ControlError> {
        self.sending.join().map(|()| self.len_bytes)
    }
}

impl Sending {
    fn join(&mut self) -> Result<(), ControlError> {
        let joined = self.thread.take().map(JoinHandle::join);
        match joined {
            Some(Ok(sent)) => sent,
            // The thread panicked, or was joined already: nothing more is sent in either case.
            Some(Err(_)) | None => Err(ControlError::Interrupted),
        }
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        // No wait: a guest may be about to resume. The frame being sent is sent whole.
        self.over.store(true, Ordering::Relaxed);
    }
}

/// Writes the head of a frame with a complete body.
fn finish(frame: &mut [u8]) -> Result<(), crate::wire::WireError> {
    let (head, body) = frame.split_at_mut(FRAME_HEAD_LEN);
    head.copy_from_slice(FrameHead::new(Message::STATE_KIND, body)?.as_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::control::{ControlChannel, Security, answered};
    use crate::saved_state::{IncomingState, SavedStateError};

    const PATIENCE: Duration = Duration::from_secs(60);

    fn channels() -> [ControlChannel; 2] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let source = thread::spawn(move || ControlChannel::connect(&address, &Security::default()).unwrap());
        let destination = answered(listener.accept().unwrap().0, PATIENCE);
        [source.join().unwrap(), destination]
    }

    fn sender(source: &ControlChannel, max_bytes: u64) -> StateSender {
        StateSender::start(source.frame_sender(), max_bytes, |_| Ok(())).unwrap()
    }

    /// Takes this many bytes in, and sends FINAL.
    fn arrive(destination: &mut ControlChannel, len_bytes: u64) -> Result<Vec<u8>, SavedStateError> {
        let mut arriving = IncomingState::new(len_bytes);
        let mut left = len_bytes;
        while left > 0 {
            let Message::State(frame) = destination.receive("state", Some(PATIENCE)).unwrap() else {
                panic!()
            };
            left -= frame.bytes.len() as u64;
            arriving.push(frame)?;
        }
        let mut state = Vec::new();
        io::Read::read_to_end(&mut arriving.complete(len_bytes)?, &mut state).unwrap();
        Ok(state)
    }

    fn state(len: usize) -> Vec<u8> {
        (0..len as u64).map(|at| (at * at / 251).to_le_bytes()[0]).collect()
    }

    #[test]
    fn a_state_arrives_as_it_was_written_however_it_was() {
        let [source, mut destination] = channels();
        for len in [0, 1, STATE_FRAME_MAX - 1, STATE_FRAME_MAX, STATE_FRAME_MAX + 1, 20 * STATE_FRAME_MAX + 7]
        {
            for piece in [len.max(1), 64 << 10, STATE_FRAME_MAX + 1, 12_345] {
                let state = state(len);
                let mut sender = sender(&source, len as u64);
                thread::scope(|scope| {
                    let arrived = scope.spawn(|| arrive(&mut destination, len as u64));
                    state.chunks(piece).for_each(|piece| sender.write_all(piece).unwrap());
                    assert_eq!(sender.close().unwrap().wait().unwrap(), len as u64);
                    assert!(arrived.join().unwrap().unwrap() == state, "{len} bytes by {piece}");
                });
            }
        }
    }

    #[test]
    fn a_state_that_is_too_long_fails_the_write_that_makes_it_so() {
        let [source, _destination] = channels();
        let mut sender = sender(&source, 10);
        sender.write_all(&[1; 10]).unwrap();
        assert_eq!(sender.too_long(), None);
        let error = sender.write_all(&[2; 3]).unwrap_err();
        assert_eq!((error.kind(), sender.too_long()), (ErrorKind::FileTooLarge, Some(13)));
        assert!(!sender.is_cut());
    }

    #[test]
    fn a_write_ends_when_the_connection_is_lost_or_nobody_waits_any_more() {
        for interrupted in [false, true] {
            let [source, destination] = channels();
            let mut sender = sender(&source, u64::MAX);
            thread::scope(|scope| {
                let writing = scope.spawn(|| {
                    let began = Instant::now();
                    loop {
                        sender.write_all(&[7; STATE_FRAME_MAX])?;
                        assert!(began.elapsed() < PATIENCE, "it is written on and on");
                    }
                });
                thread::sleep(Duration::from_millis(20));
                if interrupted {
                    source.liveness().interrupt();
                } else {
                    drop(destination);
                }
                let written: io::Result<()> = writing.join().unwrap();
                assert_eq!(written.unwrap_err().kind(), ErrorKind::BrokenPipe);
            });
            assert!(sender.is_cut());
            let error = sender.close().map(drop).unwrap_err();
            assert_eq!(matches!(error, ControlError::Interrupted), interrupted, "{error}");
        }
    }

    #[test]
    fn no_more_is_on_its_way_than_the_buffers_hold() {
        let [source, _destination] = channels();
        let (go, wait) = mpsc::channel::<()>();
        let pace = move |_| wait.recv().map_err(|_| ControlError::Interrupted);
        let mut sender = StateSender::start(source.frame_sender(), u64::MAX, pace).unwrap();
        let (written, wrote) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(move || {
                while sender.write_all(&[7; STATE_FRAME_MAX]).is_ok() {
                    let _ = written.send(());
                }
            });
            (0..FRAMES).for_each(|_| wrote.recv_timeout(PATIENCE).unwrap());
            assert!(wrote.recv_timeout(Duration::from_millis(50)).is_err(), "one more was taken");
            go.send(()).unwrap();
            wrote.recv_timeout(PATIENCE).unwrap();
            drop(go);
        });
    }

    #[test]
    fn an_attempt_that_is_over_sends_no_more_and_is_not_waited_for() {
        let [source, mut destination] = channels();
        let ((go, wait), (sends, began_to_send)) = (mpsc::channel::<()>(), mpsc::channel());
        let pace = move |_| {
            let _ = sends.send(());
            wait.recv().map_err(|_| ControlError::Interrupted)
        };
        let mut sender = StateSender::start(source.frame_sender(), u64::MAX, pace).unwrap();
        sender.write_all(&[7; 2 * STATE_FRAME_MAX]).unwrap();
        began_to_send.recv_timeout(PATIENCE).unwrap();
        let began = Instant::now();
        drop(sender);
        assert!(began.elapsed() < PATIENCE / 2);
        // The thread ends after the first.
        for _ in 0..2 {
            let _ = go.send(());
        }
        assert!(destination.receive("what was being sent", Some(PATIENCE)).is_ok());
        let more = destination.receive("more", Some(Duration::from_millis(100)));
        assert!(matches!(more, Err(ControlError::Timeout { .. })), "{more:?}");
    }
}
