//! Live migration of KVM guests: by one-sided RDMA writes out of the source's guest RAM straight into the destination's,
//! or over TCP where there is no RDMA.
//!
//! # Embedding
//!
//! A VMM implements [`Guest`](guest::Guest) for its machine, with [`SourceGuest`](guest::SourceGuest) and
//! [`DestinationGuest`](guest::DestinationGuest) for the two ends, and [`GuestHost`](guest::GuestHost) for whatever makes one; then
//! it calls [`migrate`](source::migrate) at the source and [`Receiver::receive`](destination::Receiver::receive) at the
//! destination. Two programs show that: `examples/embed_kvm.rs` is a VMM of 200 lines that moves its guest, and
//! `examples/external_memory.rs` moves a guest whose VMM is another process. The adapter of the `sterna` command to its own small VMM,
//! `src/cli/machine.rs`, does all that a VMM can.
//!
//! ```no_run
//! # fn example(guest: &dyn sterna::guest::SourceGuest) -> Result<(), Box<dyn std::error::Error>> {
//! use sterna::source::{Options, migrate};
//! use sterna::state::{HostState, StorageCheck};
//!
//! let state = HostState::in_folder("/var/lib/my-vmm".as_ref(), StorageCheck::Refuse)?;
//! // Before the guest starts: its name is taken on this host, and no guest of that name is known to run elsewhere.
//! let claim = state.start(guest.name(), false)?;
//! // ... start the guest, and when it is to move:
//! let report = migrate(guest, &claim, "host-b:7837", &Options::default(), &())?;
//! println!("it runs at host-b, after a downtime of {} ms", report.downtime_ms);
//! // Now destroy the machine: it is host-b's.
//! # Ok(())
//! # }
//! ```
//!
//! A VMM on a host with RDMA calls [`load_ahead`](transport::rdma::load_ahead) when it starts, so that no migration waits for the
//! drivers to be loaded.
//!
//! # Rooms
//!
//! A page's way through the house is one line with no turning back:
//!
//! ```text
//! KVM log → bitmap words → page runs → (zero test) → lane → queue pair → destination RAM
//! ```
//!
//! | room | |
//! |---|---|
//! | [`guest`] | what the engine needs of a VMM |
//! | [`source`], [`destination`] | the five steps of a migration, at either end |
//! | [`session`] | what guests and files share: the link, one pass over the pages, cancelling |
//! | [`image`] | a file instead of a guest: memory images, over the same lanes |
//! | [`memory`] | guest RAM as the engine sees it: regions, page runs, holes |
//! | [`dirty`] | which pages changed: the KVM log, the software bitmap, stripes |
//! | [`transport`] | how pages travel: RDMA, TCP |
//! | [`control`], [`wire`] | what two hosts say to each other: the connection, and the words |
//! | [`convergence`] | when to stop, and what to do when the rounds do not get smaller |
//! | [`saved_state`] | the saved state of vCPUs and devices on its way |
//! | [`sampling`] | how fast a guest writes its memory, before anything is sent |
//! | [`handover`], [`state`], [`lock`] | who owns the VM, what a host must not forget of that, and an arbiter |
//! | [`preflight`] | what this machine has, and what mends what it lacks |
//! | [`verify`] | whether what arrived is what the source has |
//! | [`progress`] | what a migration tells, and its report |

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("Sterna migrates KVM guests, which needs Linux on a 64-bit machine");

pub mod control;
pub mod convergence;
pub mod destination;
mod digest;
pub mod dirty;
pub mod error_code;
#[cfg(test)]
mod faults;
pub mod guest;
pub mod handover;
pub mod image;
pub mod lock;
pub mod memory;
mod panics;
pub mod preflight;
pub mod progress;
pub mod sampling;
pub mod saved_state;
pub mod session;
pub mod source;
pub mod state;
pub mod transport;
pub mod verify;
pub mod wire;
