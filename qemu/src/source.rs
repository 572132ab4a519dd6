//! A QEMU whose guest is to leave.
//!
//! | step | QEMU | its guest |
//! |---|---|---|
//! | [`start`](SourceQemu::start) | `migrate` into a socket of this process, limit 1 ms | runs |
//! | [`catch_up`](SourceQemu::catch_up) | passes over RAM, and names pages | runs, or was paused by QEMU |
//! | [`pause`](SourceQemu::pause) | the limit is raised: it pauses the guest, and waits | paused |
//! | [`save`](SourceQemu::save) | names the last pages, sends its state, releases disks | paused |
//! | [`take_back`](SourceQemu::take_back) | gives the migration up, or takes the disks again | as before |
//! | [`stop`](SourceQemu::stop) | gives the migration up, unless the guest was saved | as before |
//! | [`quit`](SourceQemu::quit) | ends | gone |

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::drain::listener::listen;
use crate::drain::{Bounds, Drain};
use crate::error::QemuError;
use crate::monitor::{MigrationStatus, Monitor, Parameter, RunState};
use crate::multifd::Dialect;
use crate::names::SharedBlock;
use crate::news::News;
use crate::note::Note;
use crate::settle::{ENDS_WITHIN, Owner, Settled, cancel, settle};
use crate::stream::Blob;
use crate::tracker::{Failed, Milestone, Naming, Tracker};
use crate::write_quota::{self, WriteQuota};

/// A QEMU whose guest is to leave.
#[derive(Debug)]
pub struct SourceQemu {
    monitor: Monitor,
    /// The guest's name.
    guest: String,
    bounds: Bounds,
    dialect: Dialect,
    attempt: Mutex<Option<Arc<Attempt>>>,
}

/// A migration out of QEMU.
#[derive(Debug)]
struct Attempt {
    tracker: Arc<Tracker>,
    drain: Drain,
    /// What QEMU's events say.
    _news: News,
    /// The guest is saved, or is being saved: another host may get it.
    saved: AtomicBool,
    /// The vCPUs' writes, if QEMU limits them.
    quota: Option<WriteQuota>,
}

/// What a QEMU has saved.
#[derive(Debug)]
pub struct Saved {
    /// What the destination QEMU loads.
    pub blob: Blob,
    /// How long QEMU took for its devices, once it had named the last page.
    pub devices: Duration,
}

impl SourceQemu {
    /// The guest of this name behind this monitor, with these shared blocks.
    ///
    /// # Errors
    /// [`QemuError::Qmp`].
    pub fn new(
        monitor: Monitor,
        guest: &str,
        shared: Vec<SharedBlock>,
        state_max_bytes: u64,
    ) -> Result<Self, QemuError> {
        let machine = monitor.machine_type()?;
        let bounds = Bounds { shared, machine, unshared_max_bytes: UNSHARED_MAX, state_max_bytes };
        let dialect = if monitor.version()?.major >= 9 { Dialect::Nine } else { Dialect::Seven };
        Ok(Self { monitor, guest: guest.to_owned(), bounds, dialect, attempt: Mutex::default() })
    }

    /// The monitor.
    #[must_use]
    pub fn monitor(&self) -> &Monitor {
        &self.monitor
    }

    /// Ends what is left of an earlier migration, which could not be ended when it failed.
    ///
    /// # Errors
    /// Those of [`take_back`](Self::take_back).
    pub fn clear_up(&self) -> Result<(), QemuError> {
        if self.attempt().is_none() && Note::is_left(&self.monitor)? {
            settle(&self.monitor, &self.guest, Owner::ThisHost)?;
        }
        Ok(())
    }

    /// Begins a migration: QEMU records writes from now on, and names pages.
    ///
    /// # Errors
    /// [`QemuError`]; no migration is under way then, and the operator's settings are as before.
    pub fn start(&self) -> Result<(), QemuError> {
        self.clear_up()?;
        let shall_run = match self.monitor.status()?.state {
            RunState::Running => true,
            RunState::Paused | RunState::PreLaunch => false,
            state => return Err(QemuError::State { state }),
        };
        let mut note = Note { guest: self.guest.clone(), shall_run, ..Note::default() };
        match self.start_with(&mut note) {
            Ok((tracker, drain, news)) => {
                let quota = note.limits_writes.then(WriteQuota::default);
                let attempt = Attempt { tracker, drain, _news: news, saved: AtomicBool::new(false), quota };
                *self.attempt() = Some(Arc::new(attempt));
                Ok(())
            }
            Err(error) => {
                // The error matters more than one of the clean-up.
                let _ = cancel(&self.monitor);
                note.fulfil(&self.monitor);
                Err(error)
            }
        }
    }

    fn start_with(&self, note: &mut Note) -> Result<(Arc<Tracker>, Drain, News), QemuError> {
        let monitor = &self.monitor;
        let (capabilities, parameters) = (monitor.capabilities()?, monitor.parameters()?);
        note.restore.set_capabilities(monitor, &capabilities, &CAPABILITIES)?;
        // As many channels as the operator has set.
        let channels = capabilities.is_on("multifd").then(|| parameters.number(Parameter::MultifdChannels));
        let channels = channels.flatten().unwrap_or(MULTIFD_CHANNELS);
        let fixed = [
            (Parameter::DowntimeLimit, 1),
            (Parameter::MaxBandwidth, BANDWIDTH_MAX),
            (Parameter::MultifdChannels, channels),
        ];
        note.restore.set_parameters(monitor, &parameters, &[&fixed[..], &throttling(0)].concat())?;
        note.limits_writes = write_quota::is_free(monitor)?;
        // Before QEMU can pause the guest.
        note.leave(monitor)?;
        if note.limits_writes {
            // QEMU counts what each vCPU writes only under a limit.
            note.limits_writes = write_quota::limit(monitor, None)
                .inspect_err(|error| tracing::debug!("the guest's writes cannot be limited: {error}"))
                .is_ok();
        }
        let tracker = Arc::new(Tracker::new(&self.bounds.shared, HOLD));
        let follow = |error| QemuError::Socket { what: "follow QEMU's events", error };
        let news = News::follow(monitor.clone(), Arc::clone(&tracker), note.shall_run).map_err(follow)?;
        let channels = usize::try_from(channels).unwrap_or(usize::MAX);
        let drain = self.migrate(channels, &tracker)?;
        Ok((tracker, drain, news))
    }

    /// QEMU connects its channels to a path.
    fn migrate(&self, channels: usize, tracker: &Arc<Tracker>) -> Result<Drain, QemuError> {
        let process = self.monitor.client().peer()?.process;
        let (listener, path) = listen()?;
        let drain = Drain::of_listener(
            (listener, process),
            (channels, self.dialect),
            self.bounds.clone(),
            Arc::clone(tracker),
        );
        let drain = drain.map_err(|error| QemuError::Socket { what: "read from QEMU", error })?;
        self.monitor.migrate(&format!("unix:{}", path.display()))?;
        Ok(drain)
    }

    /// Waits until QEMU has named enough pages to send meanwhile, has ended a pass, or has paused the guest.
    ///
    /// # Errors
    /// [`QemuError`] if the stream broke.
    pub fn catch_up(&self) -> Result<Naming, QemuError> {
        let attempt = self.present()?;
        attempt.tracker.catch_up().map_err(|Failed(reason)| QemuError::Stream(self.explain(reason)))
    }

    /// The pages that are named.
    ///
    /// # Errors
    /// [`QemuError::NotMigrating`], or that the stream broke.
    pub fn tracker(&self) -> Result<Arc<Tracker>, QemuError> {
        let attempt = self.present()?;
        match attempt.tracker.failure() {
            Some(reason) => Err(QemuError::Stream(self.explain(reason))),
            None => Ok(Arc::clone(&attempt.tracker)),
        }
    }

    /// Has QEMU slow the vCPUs by this percentage of their time, 0 to 99, and waits until it does.
    ///
    /// QEMU looks at that once in a second, at the beginning of a pass. It is read without holding back
    /// meanwhile, or it would not come to a pass.
    ///
    /// # Errors
    /// [`QemuError::Throttle`] if QEMU does not do so in time, or another error; the migration can go on.
    pub fn throttle(&self, percent: u8) -> Result<(), QemuError> {
        let attempt = self.present()?;
        self.monitor.set_parameters(throttling(percent))?;
        if percent == 0 {
            // Takes effect at the next look, or with the end of the migration.
            return Ok(());
        }
        let _reading_on = attempt.tracker.read_on();
        let deadline = Instant::now() + THROTTLES_WITHIN;
        let slowed = self.monitor.client().wait_until(deadline, |_| {
            let report = self.monitor.migration()?;
            let now = report.cpu_throttle_percentage.unwrap_or(0);
            let over = attempt.tracker.is_paused() || !report.status.is_under_way();
            Ok::<_, QemuError>((now == u64::from(percent) || over).then_some(()))
        })?;
        slowed.ok_or(QemuError::Throttle { percent })
    }

    /// Whether QEMU can limit the writes of each vCPU.
    #[must_use]
    pub fn limits_writes(&self) -> bool {
        self.attempt().as_ref().is_some_and(|attempt| attempt.quota.is_some())
    }

    /// Limits the pages that each vCPU writes in a second, or ends the limit.
    ///
    /// # Errors
    /// [`QemuError`]; the migration can go on.
    pub fn limit_writes(&self, pages_per_second: Option<NonZeroU64>) -> Result<(), QemuError> {
        Ok(write_quota::limit(&self.monitor, pages_per_second)?)
    }

    /// How many pages each vCPU has written since the first call, as far as QEMU says.
    ///
    /// # Errors
    /// [`QemuError`].
    pub fn writes(&self) -> Result<Vec<u64>, QemuError> {
        let attempt = self.present()?;
        let quota = attempt.quota.as_ref().ok_or(QemuError::NotMigrating)?;
        Ok(quota.pages(&self.monitor)?)
    }

    /// Has QEMU pause the guest, if it has not done that by itself; returns since when it is paused. No page
    /// is named until [`save`](Self::save).
    ///
    /// # Errors
    /// [`QemuError`]; the guest may be paused or not.
    pub fn pause(&self) -> Result<Instant, QemuError> {
        let attempt = self.present()?;
        if attempt.quota.is_some() {
            // A guest that moves needs it no more, and one that stays gets its time back.
            self.monitor.cancel_dirty_limit()?;
        }
        self.monitor.set_parameters([(Parameter::DowntimeLimit, DOWNTIME_MAX_MS)])?;
        attempt.tracker.open();
        self.await_milestone(&attempt, Milestone::Paused, PAUSES_WITHIN)?;
        Ok(attempt.tracker.paused_since().unwrap_or_else(Instant::now))
    }

    /// Has QEMU name the last pages and save the devices. Then QEMU has nothing to do with the guest any
    /// more, and resumes it on request only.
    ///
    /// # Errors
    /// [`QemuError`]; the guest may run again, because QEMU resumes it by itself if the stream breaks.
    pub fn save(&self) -> Result<Saved, QemuError> {
        let attempt = self.present()?;
        attempt.saved.store(true, Ordering::Relaxed);
        self.monitor.migrate_continue()?;
        let blob = attempt
            .drain
            .finish(SILENCE_MAX)
            .map_err(|error| QemuError::Stream(self.explain(error.to_string())))?;
        self.await_milestone(&attempt, Milestone::Completed, ENDS_WITHIN)?;
        self.await_release()?;
        let devices = attempt.tracker.all_named().map_or(Duration::ZERO, |named| named.elapsed());
        Ok(Saved { blob, devices })
    }

    /// QEMU says `completed` a moment before it has let the guest go.
    fn await_release(&self) -> Result<(), QemuError> {
        let deadline = Instant::now() + ENDS_WITHIN;
        let released =
            self.monitor.client().wait_until(deadline, |_| match self.monitor.status()?.state {
                RunState::PostMigrate => Ok(Some(())),
                RunState::FinishMigrate => Ok(None),
                state => Err(QemuError::State { state }),
            })?;
        released.ok_or(QemuError::State { state: RunState::FinishMigrate })
    }

    /// Ends the migration, and has the guest run on if it ran before. It is this host's, and has not run at
    /// another.
    ///
    /// # Errors
    /// [`QemuError`]; the guest may run or not if [`QemuError::is_unknown`], and else it is paused.
    pub fn take_back(&self) -> Result<Settled, QemuError> {
        if let Some(attempt) = self.attempt().take() {
            attempt.drain.abort();
        }
        settle(&self.monitor, &self.guest, Owner::ThisHost)
    }

    /// Ends the migration, unless the guest is saved: then only [`take_back`](Self::take_back) resumes it,
    /// because it may run at another host.
    ///
    /// # Errors
    /// Those of [`take_back`](Self::take_back).
    pub fn stop(&self) -> Result<(), QemuError> {
        let under_way = self.attempt().as_ref().is_some_and(|attempt| !attempt.saved.load(Ordering::Relaxed));
        if under_way {
            self.take_back()?;
        }
        Ok(())
    }

    /// Leaves QEMU stopped: its guest runs at another host.
    ///
    /// # Errors
    /// [`QemuError::Qmp`].
    pub fn leave(&self) -> Result<(), QemuError> {
        // Without a note, QEMU counts as one whose guest was given away for good.
        Ok(Note::remove(&self.monitor)?)
    }

    /// Ends QEMU: its guest runs at another host.
    ///
    /// # Errors
    /// [`QemuError::Qmp`].
    pub fn quit(&self) -> Result<(), QemuError> {
        Ok(self.monitor.quit()?)
    }

    /// How many bytes of its stream the latest migration has read or discarded.
    #[must_use]
    pub fn stream_bytes(&self) -> Option<u64> {
        self.attempt().as_ref().map(|attempt| attempt.drain.total_bytes())
    }

    /// Waits for a milestone of the migration: QEMU reports it by an event, and is asked in case that was
    /// lost.
    fn await_milestone(
        &self,
        attempt: &Attempt,
        milestone: Milestone,
        limit: Duration,
    ) -> Result<(), QemuError> {
        let (expected, name) = match milestone {
            Milestone::Paused => (MigrationStatus::PreSwitchover, "pre-switchover"),
            Milestone::Completed => (MigrationStatus::Completed, "completed"),
        };
        let deadline = Instant::now() + limit;
        while !attempt.tracker.await_milestone(milestone, ASKS_EVERY) {
            if let Some(reason) = attempt.tracker.failure() {
                return Err(QemuError::Stream(self.explain(reason)));
            }
            let report = self.monitor.migration()?;
            if report.status == expected {
                return Ok(());
            }
            if !report.status.is_under_way() || Instant::now() > deadline {
                return Err(QemuError::migration(report, name));
            }
        }
        Ok(())
    }

    /// A broken stream, with QEMU's own reason, or that QEMU does not answer.
    fn explain(&self, reason: String) -> String {
        match self.monitor.migration() {
            Ok(report) => match report.error_desc {
                Some(why) => format!("{reason}; QEMU says: {why}"),
                None => reason,
            },
            Err(error) => format!("{reason}; {error}"),
        }
    }

    fn present(&self) -> Result<Arc<Attempt>, QemuError> {
        self.attempt().clone().ok_or(QemuError::NotMigrating)
    }

    fn attempt(&self) -> MutexGuard<'_, Option<Arc<Attempt>>> {
        self.attempt.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The capabilities that a migration needs on or off. Return path off: with it on, QEMU resumes the guest by
/// itself when this process dies.
const CAPABILITIES: [(&str, bool); 5] = [
    // A channel names 128 pages at once, the main channel each by itself.
    ("multifd", true),
    ("pause-before-switchover", true),
    ("events", true),
    ("return-path", false),
    // It cannot be switched on during a migration; the parameters keep it from acting unasked.
    ("auto-converge", true),
];

/// How many multifd channels there are, unless the operator has set a number.
const MULTIFD_CHANNELS: u64 = 2;

/// The parameters by which QEMU's `auto-converge` slows the guest by so much, in one step; by 1 %, its least,
/// if that is nothing.
fn throttling(percent: u8) -> [(Parameter, u64); 4] {
    let (percent, threshold) = match percent {
        0 => (1, 100),
        // Whatever the guest writes is too much.
        percent => (percent.min(99), 1),
    };
    [
        (Parameter::CpuThrottleInitial, percent.into()),
        (Parameter::CpuThrottleIncrement, 99),
        (Parameter::MaxCpuThrottle, percent.into()),
        (Parameter::ThrottleTriggerThreshold, threshold),
    ]
}

/// More than any link: the reader of the stream holds QEMU back.
const BANDWIDTH_MAX: u64 = 1 << 40;

/// QEMU's longest downtime limit, in ms.
const DOWNTIME_MAX_MS: u64 = 2_000_000;

/// How long the link may need for what is named and unsent: the pause is longer by this if QEMU pauses the
/// guest by itself.
const HOLD: Duration = Duration::from_millis(50);

/// How much RAM may be in blocks that are not shared: firmware and video memory.
const UNSHARED_MAX: u64 = 1 << 30;

/// How long QEMU may take to pause the guest, with at most a pass of RAM before.
const PAUSES_WITHIN: Duration = Duration::from_secs(60);

/// How long QEMU may take to slow the guest: two looks, one second apart, and the passes to come to them.
const THROTTLES_WITHIN: Duration = Duration::from_secs(8);

/// How long QEMU may be silent while it sends the last pages and its state.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// How long an event may be awaited before QEMU is asked.
const ASKS_EVERY: Duration = Duration::from_millis(250);
