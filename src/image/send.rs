//! The source's side.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use memmap2::{Advice, MmapOptions, MmapRaw};
use sterna_trust::Right;

use super::blocks::{digests, image_digest};
use super::digest::ImageDigest;
use super::error::{SendError, SendFailure};
use super::extents::{BLOCK_BYTES, Content, region_of};
use crate::control::{ControlChannel, STEP_MAX, Security};
use crate::digest::{BLOCK_PAGES, Digest, blocks, digest_of_zeros};
use crate::dirty::{CaughtUp, DirtyBitmap, DirtyError, DirtyLog, DirtyRegion, InitiallyDirty, Stripes};
use crate::memory::{GuestRam, PAGE_BYTES, RamLayout, Runs};
use crate::panics::caught_or;
use crate::progress::{mbps, ms};
use crate::session::{
    Cancel, Link, Pass, RateLimiter, SendGate, SessionError, connect, new_attempt_id, unexpected,
};
use crate::transport::Transports;
use crate::wire::{AttemptId, DIGESTS_MAX, Final, IMAGE_MAX, ImageContent, ImageOffer, LaneOffer, Message};

/// How a file is to be sent.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The transports, in the order in which they are tried.
    pub transports: Transports,
    /// Number of lanes, at most 64; `None`: 4 for RDMA, as many as processors and at most 4 for TCP.
    pub lanes: Option<u8>,
    /// How the connections to the destination are protected.
    pub security: Security,
    /// Ends the transfer on request.
    pub cancel: Cancel,
}

/// The progress of a transfer, for another thread to read while it runs.
#[derive(Debug, Default)]
pub struct Progress {
    phase: AtomicU8,
    total_bytes: AtomicU64,
    done_bytes: AtomicU64,
}

/// The step of a transfer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// Connects to the destination, which reserves space.
    #[default]
    Connecting,
    /// Compares with the data that arrived in an earlier attempt.
    Comparing,
    /// Sends.
    Sending,
    /// Both ends hash the file.
    Verifying,
}

impl Progress {
    /// The current step.
    #[must_use]
    pub fn phase(&self) -> Phase {
        let phases = [Phase::Connecting, Phase::Comparing, Phase::Sending, Phase::Verifying];
        phases.get(usize::from(self.phase.load(Ordering::Relaxed))).copied().unwrap_or_default()
    }

    /// Bytes to send; 0 until that is known.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes.load(Ordering::Relaxed)
    }

    /// How many bytes the lanes have taken.
    #[must_use]
    pub fn done_bytes(&self) -> u64 {
        self.done_bytes.load(Ordering::Relaxed)
    }

    fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }
}

/// A file that is stored at the destination, which compared its digest.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// The name of the transport by which the pages travelled, such as `rdma`; `None` if the file had none.
    pub transport: Option<String>,
    /// The device or addresses, and why this transport.
    pub via: String,
    /// The file's length.
    pub file_bytes: u64,
    /// How many bytes are data rather than holes.
    pub data_bytes: u64,
    /// Bytes of pages sent. Zero pages are not sent where the destination has zeros already.
    pub bytes_sent: u64,
    /// How many bytes of the data the destination had already.
    pub bytes_resumed: u64,
    /// Time from the call to the destination's report that the file is stored.
    pub total_ms: f64,
    /// The part of `total_ms` until the first page could leave: connecting, and comparing with the
    /// destination's data.
    pub setup_ms: f64,
    /// Bytes of pages over the time in which they were sent, in MB/s (10⁶ bytes).
    pub throughput_mbps: f64,
    /// The digest that both ends computed.
    pub digest: ImageDigest,
}

/// Sends a file to the destination that listens at `to` (`HOST:PORT`), and returns once it is stored.
///
/// Only data that the destination does not hold from an earlier attempt is sent. The file is mapped: if it is
/// truncated while it is sent, SIGBUS may end the process, so a process that runs a guest must not call this.
///
/// # Errors
/// [`SendError`]; the file is unchanged, and sending it again may succeed.
pub fn send(path: &Path, to: &str, options: &Options, progress: &Progress) -> Result<Report, SendError> {
    let started = Instant::now();
    let before_sending = |cause| SendError { refused: true, cause: explained(&options.cancel, cause) };
    let source = Source::open(path).map_err(before_sending)?;
    let prepared = caught_or(|| Transfer::prepare(&source, to, options, progress));
    let mut transfer = prepared.map_err(before_sending)?;
    caught_or(|| transfer.run(started)).map_err(|cause| transfer.fail(cause))
}

/// The file, and its metadata when it was opened.
struct Source<'path> {
    path: &'path Path,
    file: File,
    name: String,
    metadata: Metadata,
    content: Content,
}

impl<'path> Source<'path> {
    fn open(path: &'path Path) -> Result<Self, SendFailure> {
        let failed = |what| move |error| SendFailure::File { what, path: path.to_owned(), error };
        // Checked before opening, because opening a device or a pipe might have an effect.
        check_kind(path, &path.metadata().map_err(failed("find"))?)?;
        let file = File::open(path).map_err(failed("open"))?;
        let metadata = file.metadata().map_err(failed("look at"))?;
        check_kind(path, &metadata)?;
        let invalid = |what, text: &str| failed(what)(io::Error::new(io::ErrorKind::InvalidInput, text));
        if metadata.len() > IMAGE_MAX {
            return Err(invalid("send", "it is longer than 16 TiB"));
        }
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| invalid("send", "its name is not UTF-8"))?.to_owned();
        let content = Content::of(&file, metadata.len()).map_err(failed("find the holes of"))?;
        Ok(Self { path, file, name, metadata, content })
    }

    fn len_bytes(&self) -> u64 {
        self.metadata.len()
    }

    fn offer(&self, attempt_id: AttemptId, lanes: Option<LaneOffer>) -> Message {
        Message::OfferImage(ImageOffer {
            attempt_id,
            name: self.name.clone(),
            len_bytes: self.len_bytes(),
            data_bytes: self.content.data_bytes,
            content: lanes.map(|lanes| ImageContent { parts: self.content.parts.clone(), lanes }),
        })
    }

    fn digests(&self) -> Result<Vec<Digest>, SendFailure> {
        digests(&self.file, &self.content.parts, |_, _| Ok(())).map_err(|error| self.failed("read", error))
    }

    /// Checks that the file has its first length and time, and no data where it had holes. Only the digests
    /// reveal a write to data through a mapping that did not change the time.
    fn check_unchanged(&self) -> Result<(), SendFailure> {
        let now = self.file.metadata().map_err(|error| self.failed("look at", error))?;
        let stamp = |metadata: &Metadata| (metadata.len(), metadata.mtime(), metadata.mtime_nsec());
        let changed = || SendFailure::Changed { path: self.path.to_owned() };
        if stamp(&now) != stamp(&self.metadata) {
            return Err(changed());
        }
        let content = Content::of(&self.file, self.len_bytes());
        let mut parts = content.map_err(|error| self.failed("find the holes of", error))?.parts;
        let is_new = |at| region_of(&self.content.parts, at).is_none();
        parts.regions.retain(|part| {
            let end = part.guest_address + part.len_bytes;
            (part.guest_address..end).step_by(BLOCK_STEP).any(is_new)
        });
        // Reading a hole of a tmpfs file through a mapping fills it with zeros.
        let look = |at: u64, block: &[u8]| {
            let differs = is_new(at) && block.iter().any(|&byte| byte != 0);
            if differs { Err(io::ErrorKind::InvalidData.into()) } else { Ok(()) }
        };
        digests(&self.file, &parts, look).map(drop).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => changed(),
            _ => self.failed("read", error),
        })
    }

    fn failed(&self, what: &'static str, error: io::Error) -> SendFailure {
        SendFailure::File { what, path: self.path.to_owned(), error }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "2 MiB on a 64-bit machine")]
const BLOCK_STEP: usize = BLOCK_BYTES as usize;

fn check_kind(path: &Path, metadata: &Metadata) -> Result<(), SendFailure> {
    let kind = metadata.file_type();
    let is = match () {
        () if kind.is_file() => return Ok(()),
        () if kind.is_dir() => "a directory",
        () if kind.is_block_device() || kind.is_char_device() => "a device",
        () => "no regular file",
    };
    Err(SendFailure::NotAFile { path: path.to_owned(), is })
}

/// A destination that accepts, and the lanes to it if there is data to send.
enum Way {
    Lanes(Box<Link>, Arc<MmapRaw>),
    NoData(Box<ControlChannel>, AttemptId),
}

impl Way {
    fn control(&mut self) -> (&mut ControlChannel, AttemptId) {
        match self {
            Self::Lanes(link, _) => (&mut link.control, link.attempt_id),
            Self::NoData(control, attempt_id) => (control, *attempt_id),
        }
    }
}

struct Transfer<'transfer> {
    source: &'transfer Source<'transfer>,
    options: &'transfer Options,
    progress: &'transfer Progress,
    way: Way,
}

/// The costs of sending.
#[derive(Default)]
struct Sent {
    rounds: u32,
    bytes: u64,
    bytes_resumed: u64,
    duration: Duration,
}

impl<'transfer> Transfer<'transfer> {
    fn prepare(
        source: &'transfer Source<'transfer>,
        to: &str,
        options: &'transfer Options,
        progress: &'transfer Progress,
    ) -> Result<Self, SendFailure> {
        let parts = &source.content.parts;
        let allowed = (&options.security, Right::Images);
        let way = if parts.regions.is_empty() {
            let (mut control, attempt_id) = (connect(to, allowed, &options.cancel)?, new_attempt_id()?);
            control.send(&source.offer(attempt_id, None))?;
            Way::NoData(Box::new(control), attempt_id)
        } else {
            let len = usize::try_from(source.len_bytes().next_multiple_of(PAGE_BYTES)).unwrap_or(usize::MAX);
            let mapping = MmapOptions::new().len(len).map_raw_read_only(&source.file);
            let mapping = Arc::new(mapping.map_err(|error| source.failed("map", error))?);
            let ram = GuestRam::from_mapping(&mapping, parts).map_err(SessionError::from)?;
            let opening = |attempt_id, lanes| source.offer(attempt_id, Some(lanes));
            let how = (&options.transports, options.lanes);
            Way::Lanes(Box::new(Link::make(ram, (to, allowed), how, &options.cancel, opening)?), mapping)
        };
        let mut transfer = Self { source, options, progress, way };
        if let Way::NoData(..) = transfer.way {
            // The destination's acceptance, which for a file with data is READY.
            transfer.await_held()?;
        }
        Ok(transfer)
    }

    fn run(&mut self, started: Instant) -> Result<Report, SendFailure> {
        let (parts, len_bytes) = (&self.source.content.parts, self.source.len_bytes());
        let sent = match self.way {
            Way::NoData(..) => Sent::default(),
            Way::Lanes(..) => self.send_data_over_any_lanes()?,
        };
        let (transport, via) = match &self.way {
            Way::NoData(..) => (None, "nothing to send".into()),
            Way::Lanes(link, _) => {
                (Some(link.scheme.clone()), format!("{} ({})", link.transport.via(), link.reason))
            }
        };
        let setup = started.elapsed();
        let digests = self.verify(sent.rounds)?;
        Ok(Report {
            transport,
            via,
            file_bytes: len_bytes,
            data_bytes: self.source.content.data_bytes,
            bytes_sent: sent.bytes,
            bytes_resumed: sent.bytes_resumed,
            total_ms: ms(started.elapsed()),
            setup_ms: ms(setup.saturating_sub(sent.duration)),
            throughput_mbps: mbps(sent.bytes, sent.duration),
            digest: image_digest(len_bytes, parts, &digests),
        })
    }

    /// Sends the data that the destination does not hold. If the device or the network fails the lanes
    /// meanwhile, those of the next transport in the list carry the rest.
    fn send_data_over_any_lanes(&mut self) -> Result<Sent, SendFailure> {
        loop {
            let sent = self.send_data();
            let (Err(SendFailure::Transfer(SessionError::Transport(cause))), Way::Lanes(link, _)) =
                (&sent, &mut self.way)
            else {
                return sent;
            };
            if link.falls_back_to(cause).is_none() {
                return sent;
            }
            let source = self.source;
            let opening = |attempt_id, lanes| source.offer(attempt_id, Some(lanes));
            link.fall_back(cause.to_string(), &self.options.cancel, opening)?;
            self.progress.done_bytes.store(0, Ordering::Relaxed);
        }
    }

    /// Sends the data that the destination does not hold: first the blocks that it lacks, without their zero
    /// pages, and then whole blocks over those that differ.
    fn send_data(&mut self) -> Result<Sent, SendFailure> {
        let (source, progress) = (self.source, self.progress);
        let held = self.await_held()?;
        let mut fresh = source
            .content
            .data_pages(&source.file, source.len_bytes())
            .map_err(|error| source.failed("find the holes of", error))?;
        let mut sent = Sent::default();
        let mut wrong = DirtyBitmap::new(&source.content.parts);
        if !held.is_empty() {
            progress.enter(Phase::Comparing);
            let data_bytes = fresh.count() * PAGE_BYTES;
            leave_out(&source.content.parts, &mut fresh, &mut wrong, &self.digests()?, &held);
            // Blocks that differ at the destination do not count as held.
            sent.bytes_resumed = data_bytes.saturating_sub((fresh.count() + wrong.count()) * PAGE_BYTES);
        }
        let Way::Lanes(link, mapping) = &mut self.way else { return Ok(sent) };
        progress.total_bytes.store((fresh.count() + wrong.count()) * PAGE_BYTES, Ordering::Relaxed);
        progress.enter(Phase::Sending);
        let log = StillFile { mapping, parts: &source.content.parts, progress };
        let stripes = Stripes::new(link.lanes.into());
        let began = Instant::now();
        for pages in [&fresh, &wrong] {
            if sent.rounds == 0 || pages.count() > 0 {
                sent.rounds += 1;
                let pass = Pass { number: sent.rounds, skips_zeros: sent.rounds == 1 };
                let check = || self.options.cancel.check();
                let pace = RateLimiter::default();
                let gate = SendGate { pace: &pace, check: &check, progress: None };
                let round = link.send_pass(pass, (pages, &stripes), Some(&log), gate)?;
                sent.bytes += round.pages * PAGE_BYTES;
            }
        }
        sent.duration = began.elapsed();
        Ok(sent)
    }

    /// Ends the transfer: both ends hash the file in parallel, and the destination compares.
    fn verify(&mut self, round: u32) -> Result<Vec<Digest>, SendFailure> {
        self.progress.enter(Phase::Verifying);
        self.options.cancel.check()?;
        self.source.check_unchanged()?;
        let compare_blocks = blocks(&self.source.content.parts).len() as u64;
        let patience = self.patience();
        let (control, attempt_id) = self.way.control();
        control.send(&Message::Final(Final { attempt_id, round, compare_blocks, state_bytes: 0 }))?;
        let digests = self.digests()?;
        self.options.cancel.check()?;
        self.source.check_unchanged()?;
        let (control, _) = self.way.control();
        for part in digests.chunks(DIGESTS_MAX) {
            control.send(&Message::Digests(part.to_vec()))?;
        }
        match control.receive("word that the file is stored", Some(patience))? {
            Message::Stored(of) if of == attempt_id => Ok(digests),
            other => Err(unexpected("STORED", attempt_id, other).into()),
        }
    }

    /// The digests of the blocks that the destination holds; none if it starts anew.
    fn await_held(&mut self) -> Result<Vec<Digest>, SendFailure> {
        let patience = self.patience();
        let count = blocks(&self.source.content.parts).len();
        let (control, attempt_id) = self.way.control();
        let mut held = Vec::new();
        loop {
            match control.receive("what the destination holds", Some(patience))? {
                Message::Digests(more) if more.is_empty() => return Ok(Vec::new()),
                Message::Digests(more) if held.len() + more.len() <= count => held.extend(more),
                other => return Err(unexpected("digests", attempt_id, other).into()),
            }
            if held.len() == count {
                return Ok(held);
            }
        }
    }

    /// The digests of the file's blocks, by the workers of the lanes.
    fn digests(&self) -> Result<Vec<Digest>, SendFailure> {
        match &self.way {
            Way::Lanes(link, _) => link.pool.install(|| self.source.digests()),
            Way::NoData(..) => Ok(Vec::new()),
        }
    }

    /// How long the destination may take to hash and write its data: 16 MiB/s is a slow rate for that.
    fn patience(&self) -> Duration {
        STEP_MAX + Duration::from_secs(self.source.content.parts.total_bytes() >> 24)
    }

    /// After a failure: informs the destination, and finds the underlying cause.
    fn fail(&mut self, cause: SendFailure) -> SendError {
        let cause = explained(&self.options.cancel, cause);
        let cause = match cause {
            // Reading fails if the file has become shorter.
            SendFailure::Transfer(SessionError::Dirty(_) | SessionError::Transport(_)) => {
                self.source.check_unchanged().err().unwrap_or(cause)
            }
            cause => cause,
        };
        let (control, attempt_id) = self.way.control();
        // The destination may be gone, which may be the failure itself.
        let _ = control.send(&Message::Abort(attempt_id, cause.to_string()));
        let cause = match (cause, &mut self.way) {
            (SendFailure::Transfer(cause), Way::Lanes(link, _)) => link.explain(cause).into(),
            (cause, _) => cause,
        };
        SendError { refused: false, cause }
    }
}

/// Reports a cancellation in place of the failure that it caused.
fn explained(cancel: &Cancel, cause: SendFailure) -> SendFailure {
    match cause {
        SendFailure::Transfer(cause) => cancel.explain(cause).into(),
        cause => cause,
    }
}

/// Takes blocks that the destination holds out of `fresh`, and moves those that differ to `wrong`.
fn leave_out(
    parts: &RamLayout,
    fresh: &mut DirtyBitmap,
    wrong: &mut DirtyBitmap,
    ours: &[Digest],
    theirs: &[Digest],
) {
    let zeros = digest_of_zeros(BLOCK_PAGES);
    for (block, (ours, theirs)) in blocks(parts).into_iter().zip(ours.iter().zip(theirs)) {
        let is_fresh =
            *theirs == if block.pages == BLOCK_PAGES { zeros } else { digest_of_zeros(block.pages) };
        if ours != theirs && is_fresh {
            continue;
        }
        let pages = block.first_page..block.first_page + block.pages;
        fresh.regions_mut()[block.region].unmark(pages.clone());
        if ours != theirs {
            wrong.regions_mut()[block.region].mark(pages);
        }
    }
}

/// Replaces a guest's dirty log: it records nothing, because nothing should write to the file.
///
/// Before a lane reads a stripe, the pages are read into memory at once. That is faster than page by page,
/// and reports a file that has become shorter as an error; SIGBUS remains possible only in a narrow race.
#[derive(Debug)]
struct StillFile<'transfer> {
    mapping: &'transfer MmapRaw,
    parts: &'transfer RamLayout,
    progress: &'transfer Progress,
}

impl DirtyLog for StillFile<'_> {
    fn start(&self) -> Result<InitiallyDirty, DirtyError> {
        Ok(InitiallyDirty::All)
    }

    fn catch_up(&self) -> Result<CaughtUp, DirtyError> {
        Ok(CaughtUp::Fully { unnamed_pages: 0 })
    }

    fn harvest(&self, _region: usize, _dirty: &mut DirtyRegion) -> Result<(), DirtyError> {
        Ok(())
    }

    fn clear(&self, region: usize, first_page: u64, bits: &[u64]) -> Result<(), DirtyError> {
        let start = self.parts.regions.get(region).map_or(0, |part| part.guest_address);
        for (first, pages) in Runs::new(bits) {
            let at = start + (first_page + first) * PAGE_BYTES;
            let [at, len] =
                [at, pages * PAGE_BYTES].map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
            match self.mapping.advise_range(Advice::PopulateRead, at, len) {
                // Linux before 5.14 does not support this.
                Err(error) if error.kind() != io::ErrorKind::InvalidInput => {
                    return Err(DirtyError::Unreadable(error));
                }
                _ => {}
            }
            self.progress.done_bytes.fetch_add(pages * PAGE_BYTES, Ordering::Relaxed);
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        Ok(())
    }
}
