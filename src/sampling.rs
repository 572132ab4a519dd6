//! Measures how fast a running guest writes its memory: switches its dirty log on for a moment. Nothing is
//! sent.
//!
//! The result is the input of a [`Forecast`](crate::convergence::Forecast) of a migration.

use std::thread;
use std::time::{Duration, Instant};

use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

use crate::convergence::{DirtyCurve, DirtySample, HandoverCost, Lost, Plan, SwitchCost};
use crate::dirty::{CaughtUp, DirtyBitmap, DirtyError, DirtyLog, Stripe, Stripes};
use crate::error_code::coded;
use crate::guest::{GuestError, SourceGuest};
use crate::memory::{GuestRam, MemoryError, PAGE_BYTES, PageRun, RamLayout, TouchedSearch};
use crate::session::HeartbeatAt;

/// The measurements of a guest.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// All of its RAM in bytes.
    pub ram_bytes: u64,
    /// How many bytes were ever touched.
    pub touched_bytes: u64,
    /// How much it wrote in intervals of several lengths, the shortest first.
    pub samples: Vec<DirtySample>,
    /// How long a harvest of the dirty log took.
    pub harvest: Duration,
    /// Heartbeats of the guest per second before its dirty log was on; `None` if it sends no heartbeats, or
    /// too few to measure.
    pub heartbeats_per_second: Option<f64>,
    /// The same while its dirty log was on.
    pub heartbeats_per_second_watched: Option<f64>,
}

/// Why a guest could not be sampled. The guest runs on.
#[derive(Debug, Error, EnumDiscriminants)]
#[strum_discriminants(
    name(SamplingErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum SamplingError {
    /// The VMM failed.
    #[error("the VMM failed: {0}")]
    Guest(#[from] GuestError),
    /// The dirty log failed.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    /// Guest RAM could not be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

coded!(SamplingError, SamplingErrorKind, "sampling", via Dirty, Memory);

impl Sampled {
    /// Watches a guest for `longest`, and before that for a half, a fourth, an eighth and a sixteenth of this
    /// time: about twice as long in total. The guest's writes are slower meanwhile, as in the rounds of a
    /// migration. The guest must not be migrating.
    ///
    /// # Errors
    /// [`SamplingError`]. The dirty log is off again, unless the kernel refuses.
    pub fn of(guest: &dyn SourceGuest, longest: Duration) -> Result<Self, SamplingError> {
        let (ram, log) = (guest.ram()?, guest.dirty_log()?);
        let layout = ram.layout();
        let mut watch = Watch {
            log: &*log,
            dirty: DirtyBitmap::new(&layout),
            stripes: Stripes::new(1),
            harvest: Duration::ZERO,
        };
        let beat = HeartbeatAt::now(guest);
        thread::sleep(longest / 4);
        let heartbeats_per_second = beat.rate_until(HeartbeatAt::now(guest));
        watch.begin()?;
        let beat = HeartbeatAt::now(guest);
        let samples = [16, 8, 4, 2, 1].map(|part| watch.sample(longest / part));
        let heartbeats_per_second_watched = beat.rate_until(HeartbeatAt::now(guest));
        let samples = samples.into_iter().collect::<Result<_, _>>()?;
        let (ram_bytes, touched_bytes, harvest) =
            (layout.total_bytes(), touched_bytes(&ram, &layout)?, watch.harvest);
        Ok(Self {
            ram_bytes,
            touched_bytes,
            samples,
            harvest,
            heartbeats_per_second,
            heartbeats_per_second_watched,
        })
    }

    /// A migration of this guest over a link that carries `bandwidth` bytes a second, within these limits.
    #[must_use]
    pub fn plan(&self, bandwidth: f64, limits: crate::convergence::Limits) -> Plan {
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let most = limits.bandwidth_max.map_or(f64::INFINITY, |most| most.get() as f64);
        Plan {
            touched_bytes: self.touched_bytes,
            curve: DirtyCurve::new(&self.samples),
            tracking_share: self.tracking_share(),
            bandwidth: bandwidth.min(most),
            round_trip: ROUND_TRIP,
            harvest: self.harvest,
            cost: SwitchCost::default(),
            handover: HandoverCost { record_here: RECORD, record_there: RECORD, ..HandoverCost::default() },
            limits,
        }
    }
}

impl Sampled {
    /// The share of the guest's time that recording its writes takes, by its heartbeats.
    fn tracking_share(&self) -> Option<f64> {
        let beats = self.heartbeats_per_second.zip(self.heartbeats_per_second_watched)?;
        Some(Lost::to_tracking(Duration::from_secs(1), beats, 0).as_secs_f64())
    }
}

/// The assumed round trip of an unknown link: that within a data centre, including the time to wake a
/// process.
const ROUND_TRIP: Duration = Duration::from_micros(200);

/// The assumed time of a record on an unknown disk: that of a solid-state disk, through a file system.
const RECORD: Duration = Duration::from_micros(500);

/// A dirty log that is on; dropping this switches it off.
struct Watch<'log> {
    log: &'log dyn DirtyLog,
    dirty: DirtyBitmap,
    stripes: Stripes,
    /// How long the latest harvest took.
    harvest: Duration,
}

impl Watch<'_> {
    fn begin(&mut self) -> Result<(), SamplingError> {
        // A log that names pages names all that the guest ever wrote first, which are no samples.
        let _ = self.log.start()?;
        // Logs may begin with all pages dirty; and while all pages are cleared, the first ones are written
        // again.
        self.dirty.fill();
        self.clear()?;
        self.harvest()?;
        Ok(())
    }

    fn sample(&mut self, interval: Duration) -> Result<DirtySample, SamplingError> {
        self.clear()?;
        let began = Instant::now();
        thread::sleep(interval);
        self.harvest()?;
        Ok(DirtySample { interval: began.elapsed(), dirty_bytes: self.dirty.count() * PAGE_BYTES })
    }

    fn clear(&mut self) -> Result<(), SamplingError> {
        for part in self.stripes.of_lane(0, &self.dirty).flat_map(Stripe::parts) {
            self.log.clear(part.region, part.first_page, part.words)?;
        }
        Ok(())
    }

    fn harvest(&mut self) -> Result<(), SamplingError> {
        self.dirty.clear();
        let began = Instant::now();
        while self.catch_up()? == CaughtUp::Partly {
            self.dirty.harvest(self.log)?;
        }
        self.dirty.harvest(self.log)?;
        self.harvest = began.elapsed();
        Ok(())
    }

    /// Waits for the log, which must not pause the guest.
    fn catch_up(&self) -> Result<CaughtUp, DirtyError> {
        match self.log.catch_up()? {
            CaughtUp::Paused { .. } => Err(DirtyError::vmm("the VMM paused the guest while it was watched")),
            caught_up => Ok(caught_up),
        }
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.log.stop() {
            tracing::warn!("the dirty log stays on: {error}");
        }
    }
}

fn touched_bytes(ram: &GuestRam, layout: &RamLayout) -> Result<u64, MemoryError> {
    let mut pages = 0;
    for (index, region) in ram.regions().iter().enumerate() {
        let all = PageRun { region: index, first_page: 0, pages: layout.regions[index].pages() };
        pages += TouchedSearch::default().touched(region, all)?.iter().map(|run| run.pages).sum::<u64>();
    }
    Ok(pages * PAGE_BYTES)
}
