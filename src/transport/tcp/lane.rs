//! The source's end of one TCP stream.

use std::fmt;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use zerocopy::IntoBytes;

use super::encrypted::send_encrypted;
use super::stall::{STALL_MAX, broken};
use crate::control::{ControlChannel, ProtectedStream, open_lane, tune};
use crate::memory::{GuestRam, MemoryError, PAGE_BYTES, PageRun, send_from};
use crate::transport::error::TransportError;
use crate::transport::lane::Lane;
use crate::wire::{FRAME_BYTES_MAX, LaneOpening, PageFrame, RUN_LEN, RUNS_MAX, Token, WireRun};

/// A connection that carries pages.
pub(crate) struct TcpLane {
    index: usize,
    stream: ProtectedStream,
    ram: GuestRam,
    /// The runs of the next frame, and their bytes.
    runs: Vec<PageRun>,
    bytes: u64,
    /// The next frame's head and list of runs; kept for its allocation.
    head: Vec<u8>,
    /// Pages to encrypt; kept for its allocation.
    pages: Vec<u8>,
}

impl TcpLane {
    /// Connects to the peer of `control` with `token`. The lane ends with the control channel.
    pub(crate) fn connect(
        control: &ControlChannel,
        lane: u8,
        token: Token,
        ram: GuestRam,
    ) -> Result<Self, TransportError> {
        let (peer, liveness) = (control.peer_address(), control.liveness());
        let open = || {
            let socket = Socket::new(Domain::for_address(peer), Type::STREAM, Some(Protocol::TCP))?;
            let stream = TcpStream::from(socket);
            // Before it connects, so that a wait for the connection ends, too.
            liveness.shut_with(&stream)?;
            SockRef::from(&stream).connect_timeout(&peer.into(), STALL_MAX)?;
            tune(&stream)?;
            Ok(stream)
        };
        let failed = |error| TransportError::Stream { lane: lane.into(), error };
        let mut stream = open_lane(open().map_err(failed)?, control.trusted_by(), STALL_MAX)?;
        let socket = stream.socket();
        socket
            .set_read_timeout(Some(STALL_MAX))
            .and_then(|()| socket.set_write_timeout(Some(STALL_MAX)))
            .and_then(|()| stream.write_all(LaneOpening::new(token, lane).as_bytes()))
            .map_err(failed)?;
        Ok(Self::over(lane.into(), stream, ram))
    }

    fn over(index: usize, stream: ProtectedStream, ram: GuestRam) -> Self {
        let head = Vec::with_capacity(PageFrame::LEN + RUNS_MAX * RUN_LEN);
        Self { index, stream, ram, runs: Vec::with_capacity(RUNS_MAX), bytes: 0, head, pages: Vec::new() }
    }

    /// A lane on the same connection that reads from other RAM.
    #[cfg(test)]
    pub(crate) fn out_of(&self, ram: GuestRam) -> std::io::Result<Self> {
        let stream = ProtectedStream::Plain(self.stream.socket().try_clone()?);
        Ok(Self::over(self.index, stream, ram))
    }

    /// Cuts the connection, as the network would.
    #[cfg(test)]
    pub(crate) fn cut(&self) {
        // An error means that the peer was faster.
        let _ = self.stream.socket().shutdown(std::net::Shutdown::Both);
    }

    fn flush(&mut self) -> Result<(), TransportError> {
        if self.runs.is_empty() {
            return Ok(());
        }
        self.head.clear();
        self.head.extend(PageFrame::pages(self.runs.len()).as_bytes());
        let mut slices = Vec::with_capacity(self.runs.len());
        for &run in &self.runs {
            let PageRun { region, first_page, pages } = run;
            let wire = WireRun::encode(run).ok_or(MemoryError::OutOfRange { region, first_page, pages })?;
            self.head.extend(wire.as_bytes());
            slices.push(self.ram.slice(run)?);
        }
        match &mut self.stream {
            ProtectedStream::Plain(stream) => send_from(stream.as_fd(), &self.head, &slices),
            ProtectedStream::Tls(stream) => send_encrypted(stream, &mut self.pages, &self.head, &slices),
        }
        .map_err(|error| broken(self.index, error))?;
        self.runs.clear();
        self.bytes = 0;
        Ok(())
    }
}

impl Lane for TcpLane {
    fn write(&mut self, run: PageRun) -> Result<(), TransportError> {
        for part in run.split(FRAME_BYTES_MAX / PAGE_BYTES) {
            if self.runs.len() == RUNS_MAX || self.bytes + part.len_bytes() > FRAME_BYTES_MAX {
                self.flush()?;
            }
            self.runs.push(part);
            self.bytes += part.len_bytes();
        }
        Ok(())
    }

    fn fence(&mut self, round: u32) -> Result<(), TransportError> {
        self.flush()?;
        let mut seen = [0; 4];
        self.stream
            .write_all(PageFrame::fence(round).as_bytes())
            .and_then(|()| self.stream.read_exact(&mut seen))
            .map_err(|error| broken(self.index, error))?;
        if u32::from_le_bytes(seen) != round {
            return Err(TransportError::Disagreement(format!(
                "the fence of round {round} was answered by another"
            )));
        }
        Ok(())
    }

    /// No memory has to be registered.
    fn waited(&self) -> Duration {
        Duration::ZERO
    }
}

impl fmt::Debug for TcpLane {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("TcpLane").field("index", &self.index).finish_non_exhaustive()
    }
}
