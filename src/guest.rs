//! What the engine needs of a VMM.

use std::error::Error;
use std::fmt;
use std::io::{BufRead, Write};
use std::time::Duration;

use crate::dirty::DirtyLog;
use crate::memory::GuestRam;
use crate::panics::{Panicked, caught};
use crate::wire::Refusal;

/// A guest in the hands of a VMM: all that the engine asks of it, at either end.
///
/// At the source the guest runs when a migration begins. The engine then calls, in this order: [`details`](Self::details),
/// [`ram`](Self::ram), [`dirty_log`](Self::dirty_log), [`throttle`](Self::throttle) any number of times,
/// [`pause`](Self::pause), [`save`](Self::save); and [`resume`](Self::resume) if the attempt fails after the pause. At the
/// destination, where a [`GuestHost`] made it, it has never run: `ram`, [`load`](Self::load), `resume`.
///
/// Nothing has a default: what a VMM forgot should not compile.
pub trait Guest: Send + Sync {
    /// The guest's name, at most 128 bytes.
    fn name(&self) -> &str;

    /// What a [`GuestHost`] at the destination needs to make the same machine: vCPUs, devices, CPU features, in the VMM's
    /// own format and at most 256 KiB. RAM is described apart.
    ///
    /// # Errors
    /// The VMM's own.
    fn details(&self) -> Result<Vec<u8>, GuestError>;

    /// A view of all of its RAM. It may be mapped from a memfd of another process.
    ///
    /// From here on until the migration is over, none of it may be discarded or mapped anew, as by a balloon: RDMA hardware
    /// would go on reading the pages that were there.
    ///
    /// At the source it is asked for again after each round and, once the guest is paused and its state saved, before anything counts
    /// on it: a migration fails if memory was plugged, unplugged or replaced meanwhile.
    ///
    /// # Errors
    /// The VMM's own.
    fn ram(&self) -> Result<GuestRam, GuestError>;

    /// The record of *all* writes to RAM: those of the vCPUs, of the VMM and of its devices. For a KVM guest usually
    /// [`EitherLog`](crate::dirty::EitherLog) of a [`KvmLog`](crate::dirty::KvmLog) and a
    /// [`SoftwareLog`](crate::dirty::SoftwareLog).
    ///
    /// # Errors
    /// The VMM's own.
    fn dirty_log(&self) -> Result<Box<dyn DirtyLog>, GuestError>;

    /// Stops all vCPUs, and devices from touching RAM. When it returns, RAM changes no more, except by [`save`](Self::save).
    ///
    /// # Errors
    /// The VMM's own; the guest counts as running.
    fn pause(&self) -> Result<(), GuestError>;

    /// Lets a paused or loaded guest run.
    ///
    /// # Errors
    /// The VMM's own. It means that no vCPU has run: of a loaded guest the source is told so, and runs it on.
    fn resume(&self) -> Result<(), GuestError>;

    /// Slows the vCPUs by so many percent, 0 to 99; 0 takes effect at once.
    ///
    /// # Errors
    /// The VMM's own; the migration goes on without.
    fn throttle(&self, percent: u8) -> Result<(), GuestError>;

    /// Writes the state of vCPUs and devices, of a paused guest. It may write to RAM, which is harvested again after.
    ///
    /// What is written is sent at once, so a VMM need not have its state in one piece. A write waits where the link is slower than
    /// the VMM, and fails where the state becomes longer than [`Options::state_max_bytes`](crate::source::Options) and the
    /// destination allow: the attempt ends then, whatever this returns, and the guest runs on.
    ///
    /// # Errors
    /// The VMM's own, or that of a write.
    fn save(&self, state: &mut dyn Write) -> Result<(), GuestError>;

    /// Puts a saved state of `len_bytes` into a machine that has never run. The state comes from a peer: bound and check
    /// everything. What was read of it is freed.
    ///
    /// # Errors
    /// The VMM's own; the machine will not be run.
    fn load(&self, state: &mut dyn BufRead, len_bytes: u64) -> Result<(), GuestError>;

    /// The guest's last sign of life, of one that gives any. Measures the downtime that the guest itself sees.
    fn heartbeat(&self) -> Option<Heartbeat>;
}

/// Makes the machines for guests that arrive.
pub trait GuestHost {
    /// The machine.
    type Guest: Guest;

    /// Makes the machine, with all of its RAM reserved and none of it touched, or says why not.
    ///
    /// `proposal` comes from a peer. Names in it may be matched against what this host knows, never opened as files.
    ///
    /// # Errors
    /// A [`Refusal`], which the source's operator reads.
    fn prepare(&self, proposal: &Proposal<'_>) -> Result<Self::Guest, Refusal>;
}

/// A guest that wants to come.
#[derive(Clone, Copy, Debug)]
pub struct Proposal<'hello> {
    /// Its name.
    pub name: &'hello str,
    /// Its RAM.
    pub ram: &'hello crate::memory::RamLayout,
    /// What [`Guest::details`] said at the source.
    pub details: &'hello [u8],
}

/// A guest's sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// How many there have been since the guest first started, at whatever host.
    pub count: u64,
    /// How long ago the last one was.
    pub age: Duration,
}

/// The latest heartbeat. It is a measurement, so a VMM that panics over it goes without.
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

    /// The VMM's error, to be downcast by who knows its type.
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
