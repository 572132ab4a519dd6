//! A process that holds a guest: it serves the guest's control socket until the guest is gone.

use std::io;
use std::os::unix::net::UnixStream;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use clap::Args;
use sterna::guest::RunOutcome;
use sterna::lock::Lock;
use sterna::progress::Observer;
use sterna::source::{
    Cancel, Doubt, GuestIs, LimitsHandle, MigrationError, MigrationFailure, Options, StillInDoubt, Verdict,
    migrate,
};
use sterna::state::GuestClaim;
use sterna::state::{Record, RecordKind};
use sterna::trust::Security;

use super::contact::Contact;
use super::ended::Ended;
use super::exit::Exit;
use super::held::HeldGuest;
use super::limits::LimitArgs;
use super::output::errln;
use super::progress::{Broadcast, Following};
use super::protocol::{Answer, Failure, Found, Move, Request, Status};
use super::server::{Asked, Serve, Served};
use super::signals;
use super::socket::{self, write_line};
use crate::poison::IgnorePoison;

/// A guest and the work on it.
#[derive(Debug)]
struct VmProcess {
    guest: Box<dyn HeldGuest>,
    /// Its name on this host, as long as the guest is on it.
    claim: GuestClaim,
    /// Held as long as the guest runs on this host.
    lock: Option<Lock>,
    work: Mutex<Work>,
    /// The doubt about the guest, if any.
    doubt: Mutex<Option<Doubt>>,
    /// The latest migration has no TLS.
    insecure: AtomicBool,
    ended: Sender<Ended>,
}

/// The work on the guest: one kind at a time.
#[derive(Debug)]
enum Work {
    /// None.
    Idle,
    /// It is moving to the named destination.
    Migrating(Cancel, LimitsHandle, String, Arc<Broadcast>),
    /// Its writes are sampled.
    Sampling,
    /// It checks its own memory.
    Checking,
    /// It was handed over, and its arrival is not confirmed.
    InDoubt,
    /// It belongs to another host, or was stopped: its process is about to end.
    Gone,
}

/// What ends a process that holds a guest.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct StdinArgs {
    /// End this process, and the guest with it, when standard input is closed
    #[arg(long, hide = true)]
    until_stdin_closes: bool,
}

impl StdinArgs {
    /// Ends this process when its standard input is closed, if that was asked for: the process then ends with
    /// the parent that holds the other end, however the parent ends.
    pub(crate) fn heed(self) {
        if self.until_stdin_closes {
            thread::spawn(|| {
                let _ = io::copy(&mut io::stdin(), &mut io::sink());
                socket::remove_all();
                process::exit(0);
            });
        }
    }
}

/// Serves the guest's control socket until the guest is gone.
pub(crate) fn hold(guest: Box<dyn HeldGuest>, claim: GuestClaim, lock: Option<Lock>) -> Ended {
    hold_with(guest, claim, lock, None)
}

/// The same for a guest that was given away and may run at the destination, which is asked.
pub(crate) fn hold_in_doubt(
    guest: Box<dyn HeldGuest>,
    claim: GuestClaim,
    lock: Option<Lock>,
    doubt: Doubt,
) -> Ended {
    hold_with(guest, claim, lock, Some(doubt))
}

fn hold_with(
    guest: Box<dyn HeldGuest>,
    claim: GuestClaim,
    lock: Option<Lock>,
    in_doubt: Option<Doubt>,
) -> Ended {
    let (ended, wait): (_, Receiver<Ended>) = channel();
    let (work, doubt) = (Mutex::new(Work::Idle), Mutex::new(None));
    let vm_process =
        Arc::new(VmProcess { guest, claim, lock, work, doubt, insecure: AtomicBool::new(false), ended });
    if let Some(doubt) = in_doubt {
        vm_process.keep_asking(doubt);
    }
    let contact = Contact::line(&socket::contact(), vm_process.guest.monitor_socket());
    vm_process.claim.announce(&contact);
    vm_process.guest.socket().serve(Arc::new(AtDesk(vm_process.clone())));
    let stopping = vm_process.clone();
    let guest = &vm_process.guest;
    signals::guest_is_held(guest.name(), guest.without_process(), move || stopping.stop());
    if guest.monitor_socket().is_some() {
        vm_process.watch_vmm();
    }
    // A sender lives in `vm_process`, so this waits until one sends.
    let ended = wait.recv().unwrap_or(Ended::Stopped);
    vm_process.guest.socket().close();
    match ended {
        Ended::Moved(_) => vm_process.guest.moved(),
        Ended::Stopped | Ended::Released => {
            vm_process.claim.retire();
            return vm_process.guest.released();
        }
        // The guest has not ended on purpose, as far as this process knows, so its record stays. No VMM
        // outlives this process.
        Ended::WithVmm => vm_process.claim.announce(&Contact::line(&socket::contact(), None)),
    }
    ended
}

impl VmProcess {
    fn serve(self: &Arc<Self>, asked: Asked, mut stream: UnixStream) {
        let mut ended = None;
        let answer = match asked {
            Ok(Request::Status | Request::List) => Answer::Status(self.status()),
            Ok(Request::Migrate(request)) => match self.start_to_migrate(*request) {
                Ok(following) => return following.follow(stream),
                Err(refusal) => refusal,
            },
            Ok(Request::Watch) => match self.watch() {
                Ok(following) => return following.follow(stream),
                Err(refusal) => refusal,
            },
            Ok(Request::SetLimits(given)) => self.set_limits(&given),
            Ok(Request::DirtyRate { longest_ms }) => self.dirty_rate(longest_ms),
            Ok(Request::Cancel) => self.cancel(),
            Ok(Request::Check) => self.check(),
            Ok(Request::Recover { resume_source, .. }) => {
                let (found, moved) = self.recover(resume_source);
                ended = moved;
                Answer::Found(found)
            }
            Ok(Request::Stop) => match self.begin(Work::Gone) {
                Ok(()) => {
                    ended = Some(Ended::Stopped);
                    Answer::Done
                }
                Err(refusal) => refusal,
            },
            Err(error) => {
                failed(Exit::Failed, format!("cannot be understood: {error}"), "the guest is as it was")
            }
        };
        // The client may be gone; the request is carried out all the same.
        let _ = write_line(&mut stream, &answer);
        self.end(ended);
    }

    /// Ends this process once the VMM of its guest has ended: in a thread, because it waits for work that is
    /// under way.
    fn watch_vmm(self: &Arc<Self>) {
        let vm_process = self.clone();
        thread::spawn(move || {
            loop {
                thread::sleep(VMM_LOOKED_AT_EVERY);
                // A destination that waits for a guest in doubt gets it all the same.
                if vm_process.guest.has_ended() && vm_process.begin(Work::Gone).is_ok() {
                    return vm_process.end(Some(Ended::WithVmm));
                }
            }
        });
    }

    /// Ends the guest and this process, if no work is under way.
    fn stop(&self) -> Result<(), Failure> {
        match self.begin(Work::Gone) {
            Err(Answer::Failed(failure)) => Err(failure),
            _ => {
                self.end(Some(Ended::Stopped));
                Ok(())
            }
        }
    }

    fn status(&self) -> Status {
        let (migrating, in_doubt) = match &*self.work() {
            Work::Migrating(..) => (true, false),
            Work::InDoubt => (false, true),
            _ => (false, false),
        };
        let insecure = migrating && self.insecure.load(Ordering::Relaxed);
        let (name, vitals) = (self.guest.name().to_owned(), self.guest.vitals());
        Status { name, vitals, migrating, in_doubt, insecure }
    }

    /// Begins a migration in its own thread, so that it does not depend on any client.
    fn start_to_migrate(self: &Arc<Self>, request: Move) -> Result<Following, Answer> {
        let (switch_cost, lock) = (self.guest.switch_cost(), self.lock.clone());
        let options = request
            .options()
            .map_err(|error| failed(Exit::Refused, error, "the guest runs at the source"))?;
        let options = Options { switch_cost, lock, ..options };
        self.insecure.store(options.security.is_insecure(), Ordering::Relaxed);
        let broadcast = Arc::new(Broadcast::default());
        let (cancel, limits) = (options.cancel.clone(), options.limits.clone());
        self.begin(Work::Migrating(cancel, limits, request.to.clone(), broadcast.clone()))?;
        let (vm_process, following) = (self.clone(), broadcast.join());
        let started = thread::Builder::new().spawn(move || {
            let answer = vm_process.migrate(&request.to, &options, &*broadcast);
            let ended = matches!(answer, Answer::Moved(_)).then_some(Ended::Moved(request.to));
            broadcast.end(answer);
            vm_process.end(ended);
        });
        started.map(|_| following).map_err(|error| {
            *self.work() = Work::Idle;
            failed(Exit::Refused, format!("cannot start a thread: {error}"), "the guest runs at the source")
        })
    }

    /// The subscription of a client that watches a migration.
    fn watch(&self) -> Result<Following, Answer> {
        match &*self.work() {
            Work::Migrating(.., broadcast) => Ok(broadcast.join()),
            work @ (Work::InDoubt | Work::Gone) => Err(work.refuse(self.guest.name())),
            _ => Err(failed(Exit::Failed, NONE_UNDER_WAY, "the guest is as it was")),
        }
    }

    fn migrate(self: &Arc<Self>, to: &str, options: &Options, observer: &dyn Observer) -> Answer {
        let over = SettleOnPanic(self, &options.security);
        let result = migrate(&*self.guest, &self.claim, to, options, observer);
        std::mem::forget(over);
        match result {
            Ok(report) => {
                *self.work() = Work::Gone;
                Answer::Moved(Box::new(report))
            }
            Err(error) => {
                let answer = Answer::Failed(failure_of(&error));
                match error.doubt {
                    Some(doubt) => self.keep_asking(*doubt),
                    None => *self.work() = Work::Idle,
                }
                answer
            }
        }
    }

    /// Keeps asking the destination for the guest's fate until it answers.
    fn keep_asking(self: &Arc<Self>, doubt: Doubt) {
        // In this order: a guest in doubt always has a doubt that can be settled.
        *self.doubt() = Some(doubt);
        *self.work() = Work::InDoubt;
        let vm_process = self.clone();
        thread::spawn(move || {
            let mut pause = ASKED_AGAIN_MIN;
            loop {
                thread::sleep(pause);
                pause = (2 * pause).min(ASKED_AGAIN_MAX);
                if let Ok(ended) = vm_process.ask_once() {
                    vm_process.end(ended);
                    return;
                }
            }
        });
    }

    /// Asks the destination once for the fate of a guest in doubt, and acts on the answer. Returns how this
    /// process is to end, if it is.
    fn ask_once(&self) -> Result<Option<Ended>, StillInDoubt> {
        self.settle(Doubt::ask)
    }

    /// Settles the doubt by a question or by the operator's word; no other thread asks meanwhile.
    fn settle(&self, by: fn(&mut Doubt) -> Verdict) -> Result<Option<Ended>, StillInDoubt> {
        let mut doubt = self.doubt();
        let Some(asking) = doubt.as_mut() else { return Ok(None) };
        let ended = match by(asking) {
            Verdict::Open(why) => {
                tracing::warn!("{} is in doubt: {why}", self.guest.name());
                return Err(why);
            }
            Verdict::Kept => {
                self.take_back();
                None
            }
            Verdict::Moved => {
                *self.work() = Work::Gone;
                Some(Ended::Moved(asking.peer().to_owned()))
            }
        };
        *doubt = None;
        Ok(ended)
    }

    /// The fate of the guest; with `fenced`, on the operator's word that the destination is fenced.
    fn recover(&self, fenced: bool) -> (Found, Option<Ended>) {
        let found = |exit, what: &str| Found { exit, what: what.into() };
        // While the operator's word is pending, the destination receives a question but no GO.
        let asked = self.settle(if fenced { Doubt::fenced } else { Doubt::ask });
        let ended = match asked {
            Ok(ended) => ended,
            Err(why) => {
                let what = format!(
                    "is paused here and perhaps runs at the destination: {why}. It is asked again and again; if that host is \
                     fenced: --resume-source --other-host-is-fenced"
                );
                return (found(Exit::InDoubt, &what), None);
            }
        };
        let found = match &*self.work() {
            Work::Gone => Some(found(Exit::Done, "has moved to another host, or was stopped")),
            Work::Migrating(..) => Some(found(Exit::Done, "is migrating; it is here until it is given away")),
            Work::InDoubt => Some(found(
                Exit::InDoubt,
                "is paused here, and its state file cannot tell whether it was given away: end this process, and ask again",
            )),
            _ => None,
        };
        (found.unwrap_or_else(|| self.recover_here()), ended)
    }

    /// The guest is this host's: it runs, or the operator paused it, unless an attempt could not resume it.
    fn recover_here(&self) -> Found {
        let found = |exit, what: String| Found { exit, what };
        if self.guest.is_running() || self.begin(Work::Checking).is_err() {
            return found(Exit::Done, "runs here".into());
        }
        let _over = IdleOnDrop(self);
        match self.guest.resume() {
            Ok(RunOutcome::Running) if self.guest.is_running() => found(Exit::Done, "runs here".into()),
            Ok(RunOutcome::Running) => found(Exit::Done, "is here, and paused as before".into()),
            Ok(RunOutcome::Unknown { reason }) if self.guest.has_ended() => {
                found(Exit::Lost, format!("has ended here with its VMM: it may be started anew ({reason})"))
            }
            Ok(RunOutcome::Unknown { reason }) => {
                found(Exit::Failed, format!("is here, and its VMM does not say whether it runs: {reason}"))
            }
            Err(error) => found(Exit::Failed, format!("is here, paused, and cannot be resumed: {error}")),
        }
    }

    /// The destination did not run the guest: it belongs to this host again.
    fn take_back(&self) {
        let name = self.guest.name();
        match self.guest.resume() {
            Ok(RunOutcome::Running) => errln!("{name} did not run at the destination and runs on here"),
            Ok(RunOutcome::Unknown { reason }) => {
                tracing::error!(
                    "{name} is this host's again, and its VMM does not say whether it runs: {reason}"
                );
            }
            Err(error) => tracing::error!("{name} is this host's again, and cannot be resumed: {error}"),
        }
        *self.work() = Work::Idle;
    }

    fn end(&self, ended: Option<Ended>) {
        if let Some(ended) = ended {
            let _ = self.ended.send(ended);
        }
    }

    fn doubt(&self) -> MutexGuard<'_, Option<Doubt>> {
        self.doubt.lock().ignore_poison()
    }

    fn cancel(&self) -> Answer {
        match &*self.work() {
            Work::Migrating(cancel, ..) if cancel.cancel() => Answer::Done,
            Work::Migrating(..) => failed(
                Exit::InDoubt,
                "too late: the guest is being given away, and the destination may run it already",
                "paused here; the migration will say where it is",
            ),
            work @ Work::InDoubt => work.refuse(self.guest.name()),
            _ => failed(Exit::Failed, NONE_UNDER_WAY, "the guest is as it was"),
        }
    }

    fn set_limits(&self, given: &LimitArgs) -> Answer {
        let Work::Migrating(_, limits, ..) = &*self.work() else {
            return failed(Exit::Failed, NONE_UNDER_WAY, "the guest is as it was");
        };
        Answer::Limits(limits.change(|limits| given.apply_to(limits)))
    }

    fn dirty_rate(&self, longest_ms: u64) -> Answer {
        if let Err(refusal) = self.begin(Work::Sampling) {
            return refusal;
        }
        let over = IdleOnDrop(self);
        let sampled = self.guest.sample(Duration::from_millis(longest_ms).min(WATCHED_MAX));
        drop(over);
        match sampled {
            Ok(samples) => Answer::Sampled(samples),
            Err(error) => {
                let (what, code) = (error.to_string(), Some(error.code().to_string()));
                Answer::Failed(Failure {
                    exit: Exit::Failed,
                    what,
                    guest: "the guest runs here".into(),
                    code,
                })
            }
        }
    }

    fn check(&self) -> Answer {
        if let Err(refusal) = self.begin(Work::Checking) {
            return refusal;
        }
        let over = IdleOnDrop(self);
        let checked = self.guest.check();
        drop(over);
        match checked {
            Ok(checked) => Answer::Checked(checked),
            Err(error) => failed(Exit::Failed, error, "the guest runs here, but did not answer"),
        }
    }

    /// Begins this work, if no other is under way.
    fn begin(&self, work: Work) -> Result<(), Answer> {
        match &mut *self.work() {
            idle @ Work::Idle => *idle = work,
            busy => return Err(busy.refuse(self.guest.name())),
        }
        Ok(())
    }

    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().ignore_poison()
    }
}

/// Ends the work, even if it panics: the next request must find the guest free.
struct IdleOnDrop<'vm_process>(&'vm_process VmProcess);

impl Drop for IdleOnDrop<'_> {
    fn drop(&mut self) {
        *self.0.work() = Work::Idle;
    }
}

/// Ends a migration that panics. If it left the guest paused, the records decide which host owns the guest.
struct SettleOnPanic<'vm_process>(&'vm_process Arc<VmProcess>, &'vm_process Security);

impl Drop for SettleOnPanic<'_> {
    fn drop(&mut self) {
        let Self(vm_process, security) = self;
        if vm_process.guest.is_running() {
            *vm_process.work() = Work::Idle;
            return;
        }
        match vm_process.claim.journal().last() {
            Some(Record { mark: RecordKind::Committed, .. }) => {
                match Doubt::of(&vm_process.claim, (security.clone(), vm_process.lock.clone())) {
                    Ok(Some(doubt)) => vm_process.keep_asking(doubt),
                    Ok(None) => {}
                    Err(error) => {
                        tracing::error!("{} stays paused: {error}", vm_process.guest.name());
                        *vm_process.work() = Work::InDoubt;
                    }
                }
            }
            Some(Record { mark: RecordKind::Done, peer, .. }) => {
                *vm_process.work() = Work::Gone;
                vm_process.end(Some(Ended::Moved(peer.clone())));
            }
            _ => vm_process.take_back(),
        }
    }
}

/// The holder's place as the server of the control socket.
struct AtDesk(Arc<VmProcess>);

impl Serve for AtDesk {
    fn serve(&self, asked: Asked, stream: UnixStream) -> Served {
        self.0.serve(asked, stream);
        Served::Done
    }
}

impl Work {
    fn refuse(&self, name: &str) -> Answer {
        match self {
            Self::Idle => failed(Exit::Failed, "nothing is under way", "the guest runs here"),
            Self::Migrating(_, _, to, _) => failed(
                Exit::Refused,
                format!(
                    "{name} is migrating to {to} already: `sterna migrate {name} --watch` shows how that goes, \
                     `sterna cancel {name}` ends it"
                ),
                "the guest is at the source until it is given away",
            ),
            Self::InDoubt => failed(
                Exit::InDoubt,
                "an earlier migration of this guest is in doubt",
                "in doubt: the guest is paused here, and perhaps running at the destination, which is asked until it says; \
                 `sterna recover` tells more",
            ),
            Self::Sampling => {
                failed(Exit::Failed, "the guest's writes are being watched", "the guest runs here")
            }
            Self::Checking => failed(Exit::Failed, "the guest is checking its memory", "the guest runs here"),
            Self::Gone => {
                failed(Exit::Failed, "the guest has moved away or was stopped", "the guest is not here")
            }
        }
    }
}

fn failed(exit: Exit, what: impl Into<String>, guest: &str) -> Answer {
    Answer::Failed(Failure { exit, what: what.into(), guest: guest.to_owned(), code: None })
}

fn failure_of(error: &MigrationError) -> Failure {
    let guest = match error.guest {
        GuestIs::InDoubt => format!("{}; `sterna recover` says more", error.guest),
        guest => guest.to_string(),
    };
    let code = Some(error.cause.code().to_string());
    Failure { exit: exit_of(error), what: error.cause.to_string(), guest, code }
}

fn exit_of(error: &MigrationError) -> Exit {
    match (error.guest, &error.cause) {
        (GuestIs::InDoubt, _) => Exit::InDoubt,
        (GuestIs::PausedAtSource | GuestIs::UnknownAtSource, _) => Exit::Failed,
        (GuestIs::RunningAtSource, MigrationFailure::Cancelled) => Exit::Cancelled,
        (GuestIs::RunningAtSource, _) if error.refused => Exit::Refused,
        (GuestIs::RunningAtSource, _) => Exit::Failed,
    }
}

const NONE_UNDER_WAY: &str = "no migration of this guest is under way";

/// The first pause before the destination is asked again for the guest's fate; each pause is longer than the
/// last.
const ASKED_AGAIN_MIN: Duration = Duration::from_secs(1);
const ASKED_AGAIN_MAX: Duration = Duration::from_secs(30);

/// How often a VMM that is a process of its own is looked at.
const VMM_LOOKED_AT_EVERY: Duration = Duration::from_millis(500);

/// The longest sampling of a guest's writes: it excludes all other work.
const WATCHED_MAX: Duration = Duration::from_secs(60);
