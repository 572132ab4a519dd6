//! The effect of signals on a process that holds a guest, or waits for one.
//!
//! | the guest | SIGHUP | SIGINT, SIGTERM |
//! |---|---|---|
//! | none, or a file in its place | ends the process | end the process |
//! | is being started | nothing | end the process |
//! | arrives, and runs at its source | ends the process if it does not arrive | end the process |
//! | is loaded, and may have to run here | the same | the same; a guest that then runs needs another signal |
//! | runs on this host | nothing | end both, once no migration is under way or in doubt |

use std::fs;
use std::process;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::{emulate_default_handler, signal_name};

use super::output::{self, errln};
use super::protocol::Failure;
use super::socket;
use crate::poison::IgnorePoison;

/// The stage of the guest in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// No guest.
    Empty,
    /// The guest is being started.
    Starting,
    /// The guest is on its way, and runs at its source.
    Incoming,
    /// The guest is loaded: its source may give it away at any moment.
    Ready,
    /// The guest runs on this host.
    Held,
}

#[derive(Debug)]
struct State {
    stage: Stage,
    /// A signal that has not been obeyed yet.
    came: Option<i32>,
}

static STATE: Mutex<State> = Mutex::new(State { stage: Stage::Empty, came: None });
static CHANGED: Condvar = Condvar::new();

/// From now on a signal ends this process only according to the table.
pub(crate) fn catch(stage: Stage) {
    state().stage = stage;
    let ignored = ignored();
    // A signal that the parent ignored stays ignored, as `nohup` and shells expect.
    let caught = [SIGHUP, SIGINT, SIGTERM].into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0);
    let waiting = Signals::new(caught).and_then(|mut signals| {
        thread::Builder::new().name("signals".into()).spawn(move || signals.forever().for_each(obey))
    });
    if let Err(error) = waiting {
        tracing::warn!("signals cannot be caught, so they end this process at once: {error}");
    }
}

/// A guest is about to arrive.
pub(crate) fn guest_arrives() {
    state().stage = Stage::Incoming;
}

/// From now on its source may give the guest away.
pub(crate) fn guest_is_ready() {
    state().stage = Stage::Ready;
}

/// The guest did not arrive, or will not run on this host.
pub(crate) fn no_guest() {
    let mut state = state();
    state.stage = Stage::Empty;
    if let Some(signal) = state.came {
        end(&state, signal);
    }
}

/// The guest runs on this host. On SIGINT or SIGTERM `stop` ends it and this process, unless it returns an
/// obstacle; `fate` is what happens to the guest then.
pub(crate) fn guest_is_held(
    name: &str,
    fate: &'static str,
    stop: impl Fn() -> Result<(), Failure> + Send + 'static,
) {
    let mut state = state();
    state.stage = Stage::Held;
    let name = name.to_owned();
    if let Some(signal) = state.came.take().filter(|&signal| signal != SIGHUP) {
        let signal = describe(signal);
        errln!(
            "{signal}: {name} was given away to this host by then, and runs here; another {signal} ends this process"
        );
    }
    let waiting = thread::Builder::new().spawn(move || {
        let signal = describe(await_end());
        let mut said = String::new();
        while let Err(Failure { what, .. }) = stop() {
            if what != said {
                errln!("{signal}: {what}. After that {name}, if it is here, {fate}, and this process ends");
                said = what;
            }
            thread::sleep(NAP);
        }
        errln!("{signal}: {name} {fate}, and this process ends");
    });
    if let Err(error) = waiting {
        tracing::warn!("SIGTERM will not end this process, but `sterna` commands do: {error}");
    }
}

/// The interval for retrying `stop`.
const NAP: Duration = Duration::from_millis(50);

/// Waits for the signal that is to end a running guest.
fn await_end() -> i32 {
    let mut state = state();
    loop {
        match state.came {
            Some(signal) => return signal,
            None => state = CHANGED.wait(state).ignore_poison(),
        }
    }
}

fn obey(signal: i32) {
    let mut state = state();
    match (state.stage, signal) {
        (Stage::Starting | Stage::Held, SIGHUP) => {
            tracing::warn!("SIGHUP: the terminal is gone, and this process goes on without");
        }
        (Stage::Empty, _) | (Stage::Starting | Stage::Incoming, SIGINT | SIGTERM) => end(&state, signal),
        _ => {
            if state.stage == Stage::Ready && signal != SIGHUP {
                let signal = describe(signal);
                errln!(
                    "{signal}: the guest is loaded and may have to run here, so this process ends if it does not"
                );
            }
            state.came = state.came.filter(|_| signal == SIGHUP).or(Some(signal));
            CHANGED.notify_all();
        }
    }
}

/// Ends this process by a signal, as if it had not been caught. The caller holds the lock of the state, so
/// nothing changes meanwhile.
fn end(state: &State, signal: i32) -> ! {
    let name = describe(signal);
    match state.stage {
        Stage::Starting => errln!("{name}: this process ends, and the guest was not started"),
        Stage::Incoming => errln!("{name}: this process ends, and the guest stays at its source"),
        _ => {}
    }
    socket::remove_all();
    output::flush();
    let _ = emulate_default_handler(signal);
    process::exit(128 + signal)
}

fn describe(signal: i32) -> &'static str {
    signal_name(signal).unwrap_or("a signal")
}

/// The signals that this process was started to ignore, a bit each.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

fn state() -> MutexGuard<'static, State> {
    STATE.lock().ignore_poison()
}
