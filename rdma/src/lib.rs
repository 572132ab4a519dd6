//! RDMA verbs made safe: the part of libibverbs that moves memory with one-sided writes over reliable
//! connections.
//!
//! libibverbs is loaded at run time, so a program built with this crate starts on any machine and gets a
//! plain error when the library or a device is missing. The build needs nothing but Rust.
//!
//! # The objects, and how they hold each other
//!
//! ```text
//! Library ── devices ──▶ Device ── ports ──▶ Port ── choose_gid ──▶ Gid
//!                          ▲
//!            ┌─────────────┴─────────────┐
//!     ProtectionDomain            CompletionQueue
//!            ▲   ▲                       ▲
//!    ┌───────┘   └────────┐    ┌─────────┘
//! MemoryRegion ◀──────── QueuePair
//!    │          keeps what
//!    ▼          it posted from
//! Mapping (memory of the caller's)
//! ```
//!
//! An arrow upwards, or into a region, is an `Arc`: the order of teardown that verbs demand follows from
//! ownership. A region is deregistered after the last queue pair that posted from it has been destroyed or
//! has released it; the region releases its [`Mapping`] after that. So safe code cannot unmap memory under a
//! device.
//!
//! # One transfer
//!
//! ```no_run
//! use std::sync::Arc;
//! use std::time::Duration;
//! use sterna_rdma::{
//!     Access, Capacity, Completion, CompletionQueue, ConnectOptions, Device, Endpoint, GidChoice, Library,
//!     Mapping, MemoryRegion, ProtectionDomain, QueuePair, RemoteKey, Transfer, WriteList,
//! };
//!
//! # fn example(
//! #     exchange: impl Fn(Endpoint) -> (Endpoint, u64, RemoteKey),
//! #     ram: Arc<dyn Mapping>,
//! # ) -> Result<(), Box<dyn std::error::Error>> {
//! let library = Library::load()?;
//! let device = Device::open(&library, &library.devices()?[0].name)?;
//! let port = &device.ports()?[0];
//! let gid = port.choose_gid(GidChoice::Auto)?;
//!
//! let domain = ProtectionDomain::new(&device)?;
//! let completions = CompletionQueue::new(&device, 1024)?;
//! let mut queue_pair =
//!     QueuePair::new(&domain, port, &gid, &completions, &completions, Capacity::default())?;
//! let (peer, remote_address, remote_key) = exchange(queue_pair.local_endpoint());
//! queue_pair.connect(&peer, &ConnectOptions::default())?;
//!
//! let region = MemoryRegion::register(&domain, ram, 0, 1 << 20, Access::LocalRead)?;
//! let mut list = WriteList::with_capacity(256);
//! for page in 0..256 {
//!     let offset_bytes = page * 4096;
//!     list.push(Transfer {
//!         region: &region,
//!         offset_bytes,
//!         len_bytes: 4096,
//!         remote_address: remote_address + offset_bytes as u64,
//!         remote_key,
//!         id: page as u64,
//!         signalled: page == 255,
//!     })?;
//! }
//! queue_pair.post_writes(&mut list)?;
//!
//! let mut done = [Completion::BLANK; 16];
//! let count = completions.wait(&mut done, Duration::from_secs(10))?;
//! for completion in &done[..count] {
//!     completion.result?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # The rooms
//!
//! | module | what it knows |
//! |---|---|
//! | `library` | finding libibverbs and its devices |
//! | `device`, `port`, `gid`, `events` | an open device, its ports, the choice of an address, its events |
//! | `protection_domain`, `memory_region` | registered memory and the right to access it |
//! | `endpoint` | what two ends exchange, checked before use |
//! | `queue_pair`, `work` | connecting, and posting lists of writes |
//! | `completion`, `completion_error` | results of requests |
//! | `error` | all other errors |
//! | `sys` | libibverbs as C declares it; the only module with unsafe code |

mod completion;
mod completion_error;
mod device;
mod endpoint;
mod error;
mod events;
mod gid;
mod library;
mod memory_region;
mod port;
mod protection_domain;
mod queue_pair;
mod sys;
#[cfg(feature = "witness")]
#[doc(hidden)]
pub mod witness;
mod work;

pub use completion::{Completion, CompletionKind, CompletionQueue};
pub use completion_error::{CompletionError, CompletionStatus};
pub use device::{Device, DeviceLimits};
pub use endpoint::{Endpoint, EndpointError};
pub use error::Error;
pub use events::{AsyncEvent, AsyncEventKind};
pub use gid::{Gid, GidChoice, GidError, GidKind};
pub use library::{DeviceInfo, Library, Transport};
pub use memory_region::{Access, MemoryRegion, RemoteKey};
pub use port::{LinkLayer, Mtu, Port, PortState};
pub use protection_domain::ProtectionDomain;
pub use queue_pair::{Capacity, ConnectOptions, PeerAccess, QueuePair};
pub use sys::Mapping;
pub use work::{MESSAGE_BYTES_MAX, PostError, Transfer, TransferError, WriteList};
