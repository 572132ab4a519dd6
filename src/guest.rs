//! The interface between the engine and a VMM.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::time::Duration;

use crate::dirty::{DirtyError, DirtyLog};
use crate::memory::{GuestRam, MemoryError};
use crate::panics::{Panicked, caught};
use crate::saved_state::{SectionError, StateReader, StateWriter};
pub use crate::wire::Refusal;

/// What both ends need from a VMM for a guest.
///
/// A VMM implements this and [`SourceGuest`] for a guest that leaves, this and [`DestinationGuest`] for one
/// that arrives; a VMM with guests that may do both has one type with all three. No method has a default, so
/// a missing one does not compile.
///
/// The VMM may be another process. Then RAM is a file that both processes map
/// ([`RamRegion::map_file`](crate::memory::RamRegion::map_file)), the dirty log is fed by messages of the
/// other process ([`DirtyError::Vmm`] reports its failures), and a call with a
/// lost answer returns [`RunOutcome::Unknown`].
pub trait Guest: Send + Sync {
    /// The guest's name on this host, at most 128 bytes.
    fn name(&self) -> &str;

    /// A view of all of its RAM. It may be mapped from a memfd of another process.
    ///
    /// From this call until the migration is over, no part of RAM may be discarded or remapped, such as by a
    /// balloon: RDMA hardware would go on reading the pages that were mapped before.
    ///
    /// At the source the engine calls it again after each round and, once the guest is paused and its state
    /// saved, before it relies on the memory: a migration fails if memory was plugged, unplugged or replaced
    /// meanwhile.
    ///
    /// # Errors
    /// The VMM's own.
    fn ram(&self) -> Result<GuestRam, GuestError>;

    /// The guest's latest heartbeat, if it sends any. It measures the downtime that the guest sees.
    fn heartbeat(&self) -> Option<Heartbeat>;
}

/// A running guest that is to leave.
///
/// The engine calls, in this order: [`details`](Self::details), [`ram`](Guest::ram),
/// [`dirty_log`](Self::dirty_log), [`write_quota`](Self::write_quota) and [`throttle`](Self::throttle) any
/// number of times, [`pause`](Self::pause), [`save`](Self::save); and [`resume`](Self::resume) if the attempt
/// fails after `pause` was called. Once [`migrate`](crate::source::migrate) has returned a report, the VMM
/// destroys the guest.
pub trait SourceGuest: Guest {
    /// What a [`GuestHost`] at the destination needs to build the same machine: vCPUs, devices, CPU features.
    /// The format is the VMM's own, the length at most 256 KiB. [`ram`](Guest::ram) describes RAM.
    ///
    /// # Errors
    /// The VMM's own.
    fn details(&self) -> Result<Vec<u8>, GuestError>;

    /// The record of *all* writes to RAM: those of the vCPUs, of the VMM and of its devices. For a KVM guest
    /// usually [`EitherLog`](crate::dirty::EitherLog) of a [`KvmLog`](crate::dirty::KvmLog) and a
    /// [`SoftwareLog`](crate::dirty::SoftwareLog).
    ///
    /// # Errors
    /// The VMM's own.
    fn dirty_log(&self) -> Result<Box<dyn DirtyLog>, GuestError>;

    /// Slows the vCPUs by this percentage of their time, 0 to 99; 0 takes effect at once.
    ///
    /// # Errors
    /// The VMM's own; the migration goes on without throttling.
    fn throttle(&self, percent: u8) -> Result<(), GuestError>;

    /// Limits of the writes of each vCPU, if the VMM has them: they are used in place of
    /// [`throttle`](Self::throttle), because a vCPU that writes little is not slowed then.
    fn write_quota(&self) -> Option<&dyn WriteQuota>;

    /// Stops all vCPUs, and stops devices from accessing RAM. Once it returns, RAM changes no more, except by
    /// [`save`](Self::save).
    ///
    /// # Errors
    /// The VMM's own. The guest may be paused or not: the engine calls [`resume`](Self::resume).
    fn pause(&self) -> Result<(), GuestError>;

    /// Writes the state of vCPUs and devices of the paused guest, as named sections in the VMM's own formats.
    /// It may write to RAM: the dirty log is harvested again afterwards.
    ///
    /// The engine sends the state as it is written, so a VMM need not have it in one piece. A write waits if
    /// the link is slower than the VMM, and fails if the state becomes longer than
    /// [`Options::state_max_bytes`](crate::source::Options) and the destination allow: then the attempt ends,
    /// whatever this returns, and the guest runs on.
    ///
    /// # Errors
    /// The VMM's own, or that of a write.
    fn save(&self, state: &mut StateWriter<'_>) -> Result<(), GuestError>;

    /// Resumes the guest after a failed attempt. The guest is usually paused; after an error of
    /// [`pause`](Self::pause) it may still run, and continues.
    ///
    /// # Errors
    /// The VMM's own: the guest stays paused. A VMM that does not know returns [`RunOutcome::Unknown`]
    /// instead.
    fn resume(&self) -> Result<RunOutcome, GuestError>;
}

/// A quota of pages that each vCPU of a guest may write in a second.
///
/// The engine calls [`writes`](Self::writes) after each round, and [`limit`](Self::limit) before a round and
/// when the limit is to end. A failure of either is no failure of the migration.
pub trait WriteQuota: Send + Sync {
    /// What each vCPU has written so far, in the same order each time.
    ///
    /// # Errors
    /// The VMM's own.
    fn writes(&self) -> Result<Vec<VcpuWrites>, GuestError>;

    /// Has each vCPU stand still, for short times, that writes more pages a second than this, which were not
    /// dirty before; `None` takes effect at once.
    ///
    /// # Errors
    /// The VMM's own; the engine then calls [`SourceGuest::throttle`].
    fn limit(&self, pages_per_second: Option<NonZeroU64>) -> Result<(), GuestError>;
}

/// What a vCPU has written, and what a quota took from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuWrites {
    /// Pages that became dirty by its writes since any fixed moment.
    pub pages: u64,
    /// How long it stood still because of a quota, since any fixed moment; `None` if the VMM does not measure
    /// that.
    pub stood_still: Option<Duration>,
}

/// A guest that arrives, in a machine that a [`GuestHost`] built and that has never run.
///
/// The engine calls [`ram`](Guest::ram), [`can_arrive`](Self::can_arrive) any number of times,
/// [`load`](Self::load) and [`start`](Self::start) in this order. After a failure in any of these calls, it
/// calls [`discard`](Self::discard); after a panic of the VMM it may only drop the guest.
pub trait DestinationGuest: Guest {
    /// Whether the machine can still take the guest: its VMM may be another process, and end by itself. While
    /// pages arrive the engine asks about once a second, on the thread that answers the source, so this must
    /// not wait.
    ///
    /// # Errors
    /// The VMM's own: the attempt ends, and the guest runs on at the source.
    fn can_arrive(&self) -> Result<(), GuestError>;

    /// Loads a saved state into the machine. The state comes from a peer: bound and check everything. The
    /// engine frees the parts that were read. A section that is left unread is an error, even if this returns
    /// `Ok`.
    ///
    /// # Errors
    /// The VMM's own; the machine will not be started. Name the section that is unknown or missing, as
    /// [`SectionReader::unknown`](crate::saved_state::SectionReader::unknown) and
    /// [`StateReader::section`](StateReader::section) do.
    fn load(&self, state: &mut StateReader<'_>) -> Result<(), GuestError>;

    /// Starts the loaded guest. Called at most once, after the source handed the guest over.
    ///
    /// # Errors
    /// The VMM's own. An error promises that no vCPU has run and none will: the destination reports that to
    /// the source, which resumes the guest. A VMM that cannot promise that returns [`RunOutcome::Unknown`]:
    /// the guest then stays with this host.
    fn start(&self) -> Result<RunOutcome, GuestError>;

    /// Frees the machine, which will not run on this host.
    ///
    /// # Errors
    /// The VMM's own: the machine may still exist. The error is logged, and this side does not report it to
    /// the source, which detects by itself that the attempt is over.
    fn discard(self) -> Result<(), GuestError>
    where
        Self: Sized;
}

/// Whether a guest runs after a request to run it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunOutcome {
    /// The guest runs.
    Running,
    /// The guest may run or not, and only its VMM knows: for example, if the VMM is another process and its
    /// answer was lost.
    Unknown {
        /// Why that is unknown.
        reason: String,
    },
}

/// Builds the machines for guests that arrive.
pub trait GuestHost {
    /// The machine.
    type Guest: DestinationGuest;

    /// Builds the machine, with all of its RAM reserved and none touched, or refuses with a reason.
    ///
    /// `proposal` comes from a peer. Names in it may be matched against names known to this host, but never
    /// opened as files.
    ///
    /// # Errors
    /// A [`Refusal`], which is shown to the source's operator.
    fn prepare(&self, proposal: &Proposal<'_>) -> Result<Self::Guest, Refusal>;
}

/// A guest that a source offers.
#[derive(Clone, Copy, Debug)]
pub struct Proposal<'hello> {
    /// Its name.
    pub name: &'hello str,
    /// The layout of its RAM.
    pub ram: &'hello crate::memory::RamLayout,
    /// What [`SourceGuest::details`] returned at the source, at most 256 KiB.
    pub details: &'hello [u8],
    /// The address of the source.
    pub from: SocketAddr,
}

/// A guest's heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// How many heartbeats it has sent since it first started, at any host.
    pub count: u64,
    /// Time since the last one.
    pub age: Duration,
}

/// Discards a guest; returns whether the VMM did so.
pub(crate) fn discard<G: DestinationGuest>(guest: G) -> bool {
    let why = match caught(|| guest.discard()) {
        Ok(Ok(())) => return true,
        Ok(Err(error)) => error.to_string(),
        Err(Panicked(text)) => format!("the VMM panicked: {text}"),
    };
    tracing::error!("a guest that will not run on this host could not be freed: {why}");
    false
}

/// The latest heartbeat. It is only a measurement, so a panic of the VMM counts as no heartbeat.
pub(crate) fn heartbeat_of(guest: &dyn Guest) -> Option<Heartbeat> {
    caught(|| guest.heartbeat()).unwrap_or_else(|Panicked(text)| {
        tracing::error!("the VMM panicked when it was asked for the guest's heartbeat: {text}");
        None
    })
}

/// An error of the VMM.
#[derive(Debug)]
pub struct GuestError(Box<dyn Error + Send + Sync>);

impl GuestError {
    /// Wraps the VMM's error, or a text.
    pub fn new(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(error.into())
    }

    /// The VMM's error, for a caller that downcasts to its type.
    #[must_use]
    pub fn inner(&self) -> &(dyn Error + Send + Sync + 'static) {
        &*self.0
    }
}

impl fmt::Display for GuestError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

impl Error for GuestError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source()
    }
}

impl From<io::Error> for GuestError {
    fn from(error: io::Error) -> Self {
        Self::new(error)
    }
}

impl From<SectionError> for GuestError {
    fn from(error: SectionError) -> Self {
        Self::new(error)
    }
}

impl From<MemoryError> for GuestError {
    fn from(error: MemoryError) -> Self {
        Self::new(error)
    }
}

impl From<DirtyError> for GuestError {
    fn from(error: DirtyError) -> Self {
        Self::new(error)
    }
}
