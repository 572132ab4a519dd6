//! Live migration of KVM guests: by one-sided RDMA writes from the source's guest RAM straight into the
//! destination's, or over TCP without RDMA.
//!
//! # Embedding
//!
//! A VMM implements [`Guest`](guest::Guest) for its machine, with [`SourceGuest`](guest::SourceGuest) and
//! [`DestinationGuest`](guest::DestinationGuest) for the two ends, and [`GuestHost`](guest::GuestHost) for
//! building machines. Then it calls [`migrate`](source::migrate) at the source and
//! [`Receiver::receive`](destination::Receiver::receive) at the destination. Two programs show that:
//! `examples/embed_kvm.rs` is a VMM of 200 lines that moves its guest, and `examples/external_memory.rs`
//! moves a guest of a VMM in another process. The adapter of the `sterna` command to its own small VMM,
//! `src/cli/machine.rs`, uses the whole interface.
//!
//! ```no_run
//! # fn example(guest: &dyn sterna::guest::SourceGuest) -> Result<(), Box<dyn std::error::Error>> {
//! use sterna::source::{Options, migrate};
//! use sterna::state::{HostState, StorageCheck};
//!
//! let state = HostState::in_folder("/var/lib/my-vmm".as_ref(), StorageCheck::Refuse)?;
//! // Before the guest starts: claim its name on this host, and check that it does not run elsewhere.
//! let claim = state.start(guest.name(), false)?;
//! // ... start the guest; later, to migrate it:
//! let report = migrate(guest, &claim, "host-b:7837", &Options::default(), &())?;
//! println!("it runs at host-b, after a downtime of {} ms", report.downtime_ms);
//! // Now destroy the machine: host-b owns the guest.
//! # Ok(())
//! # }
//! ```
//!
//! A VMM on a host with RDMA calls [`load_ahead`](transport::rdma::RdmaProvider::load_ahead) when it starts,
//! so that no migration waits for the drivers to load.
//!
//! # Rooms
//!
//! A page takes one path through the modules, and never back:
//!
//! ```text
//! KVM log → bitmap words → page runs → (first round: zero test) → lane → queue pair → destination RAM
//! ```
//!
//! | room | |
//! |---|---|
//! | [`guest`] | the interface between the engine and a VMM |
//! | [`source`], [`destination`] | the five steps of a migration, at either end |
//! | [`session`] | shared by guests and files: the link, one pass over the pages, cancelling |
//! | [`image`] | a file instead of a guest: memory images, over the same lanes |
//! | [`memory`] | guest RAM as the engine accesses it: regions, page runs, holes |
//! | [`dirty`] | which pages changed: the KVM log, the software bitmap, stripes |
//! | [`transport`] | how pages travel: RDMA, TCP |
//! | [`trust`] | a host's key, the hosts that it trusts, how connections are protected |
//! | [`control`], [`wire`] | the control connection, and the protocol's messages |
//! | [`convergence`] | when to switch, and what to do when the rounds do not get smaller |
//! | [`saved_state`] | the saved state of vCPUs and devices in transit |
//! | [`sampling`] | how fast a guest writes its memory, before anything is sent |
//! | [`handover`], [`state`], [`lock`] | which host owns the guest, its durable records, and an arbiter |
//! | `host` | what this host has: memory to use and to lock, KVM, privileges |
//! | [`verify`] | whether the memory that arrived is the source's |
//! | [`progress`] | events of a migration, and its report |
//! | [`error_code`] | the stable codes of all errors |

// Items and exports of modules that only the feature makes public.
#![cfg_attr(not(feature = "unstable"), allow(unreachable_pub, unused_imports))]
// Links to it are plain text without it.
#![cfg_attr(not(feature = "unstable"), allow(rustdoc::private_intra_doc_links))]

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("Sterna migrates KVM guests, which needs Linux on a 64-bit machine");

/// Public with the feature `unstable`, else visible in this crate alone: what this repository's tests, fuzz
/// targets and benchmarks use, and transports from outside. No promise of stability holds for it.
macro_rules! unstable {
    ($($item:tt)*) => {
        #[cfg(feature = "unstable")]
        #[doc(hidden)]
        pub $($item)*
        #[cfg(not(feature = "unstable"))]
        #[allow(unused_imports)]
        pub(crate) $($item)*
    };
}

// Modules are declared without the macro, because rustfmt would not find their files.
#[cfg(not(feature = "unstable"))]
mod control;
#[cfg(feature = "unstable")]
#[doc(hidden)]
pub mod control;
pub mod convergence;
pub mod destination;
mod digest;
pub mod dirty;
pub mod error_code;
mod error_codes;
#[cfg(test)]
mod faults;
#[cfg(any(test, feature = "unstable"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod guest;
#[cfg(not(feature = "unstable"))]
mod handover;
#[cfg(feature = "unstable")]
#[doc(hidden)]
pub mod handover;
#[doc(hidden)]
pub mod host;
pub mod image;
pub mod lock;
pub mod memory;
mod panics;
mod poison;
pub mod progress;
pub mod sampling;
pub mod saved_state;
#[cfg(not(feature = "unstable"))]
mod session;
#[cfg(feature = "unstable")]
#[doc(hidden)]
pub mod session;
pub mod source;
pub mod state;
pub mod transport;
pub mod trust;
#[cfg(not(feature = "unstable"))]
mod verify;
#[cfg(feature = "unstable")]
#[doc(hidden)]
pub mod verify;
#[cfg(not(feature = "unstable"))]
mod wire;
#[cfg(feature = "unstable")]
#[doc(hidden)]
pub mod wire;
