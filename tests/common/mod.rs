//! Shared by the end-to-end tests: hosts with real processes of the `sterna` command, and a guest for the
//! library's tests.

#![allow(dead_code, reason = "each test program uses its own part of this")]
#![allow(unused_imports, reason = "likewise")]

mod go_between;
#[cfg(feature = "cli")]
mod host;
mod machine;
mod process;
pub(crate) mod qemu;
mod random;
mod rdma_messages;
mod relay;
mod tap;
#[cfg(feature = "cli")]
mod witness;

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use sterna::host::{KvmAccess, kvm_access};
use sterna_vmm::MachineKind;

pub(crate) use go_between::go_between;
#[cfg(feature = "cli")]
pub(crate) use host::{Host, Receiving, moves_away_from, runs_on};
pub(crate) use machine::{Fault, TestGuest, TestHost, Watch};
pub(crate) use process::{Ended, Process};
pub(crate) use random::Random;
pub(crate) use rdma_messages::{change_endpoints, change_keys};
pub(crate) use relay::{Fate, From, relay};
pub(crate) use tap::{Tap, Then, Way, say_go};
#[cfg(feature = "cli")]
pub(crate) use witness::{never_runs_twice, phase};

/// The longest wait before a test counts as hung. Emulated labs are slow.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// The default unless a test is about the downtime: no switch takes so long, even where a busy disk delays
/// the records.
pub(crate) const PATIENT: &str = "--downtime-limit=5000";

/// A migration of a [`BUSY`] guest that lasts for the maximum of rounds: the rest takes longer to send than
/// the limit allows, and no policy changes that. The limit is still high enough for a switch with nothing
/// left to send.
pub(crate) const ENDLESS: [&str; 5] = [
    "--downtime-limit=500",
    "--max-rounds=10000",
    "--if-stuck=throttle",
    "--throttle-max=0",
    "--bandwidth-limit=8",
];

/// The same, with rounds so long that it takes minutes: for effects that need time to show.
pub(crate) const LONG: [&str; 5] = [ENDLESS[0], ENDLESS[1], ENDLESS[2], ENDLESS[3], "--bandwidth-limit=4"];

/// A guest that writes as fast as it can, so that those rounds take their time.
pub(crate) const BUSY: &str = "--dirty-rate=10000";

/// A real guest if KVM is usable, else a synthetic one.
pub(crate) fn machine_kind() -> MachineKind {
    static KIND: OnceLock<MachineKind> = OnceLock::new();
    *KIND.get_or_init(|| match kvm_access() {
        KvmAccess::Usable => MachineKind::Kvm,
        unusable => {
            println!("the guests of this test are synthetic: {unusable}");
            MachineKind::Synthetic
        }
    })
}

/// The same as a word of the command line.
pub(crate) fn machine_word() -> &'static str {
    match machine_kind() {
        MachineKind::Kvm => "kvm",
        MachineKind::Synthetic => "synthetic",
    }
}

/// Whether this is a lab, where a missing device is a failure and no reason to skip.
pub(crate) fn in_a_lab() -> bool {
    std::env::var_os("STERNA_LAB").is_some_and(|value| value == "1")
}

/// Waits until `holds` returns true; `what` names the condition when it never does.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "in {} s it did not come to this: {what}", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(5));
    }
}
