//! Which pages changed.
//!
//! A [`DirtyLog`] reports which pages were written since the last time. There are two kinds, and a KVM guest
//! needs both at once: [`KvmLog`] reports what the vCPUs wrote, [`SoftwareLog`] what the VMM and its device
//! threads wrote, which KVM never sees. [`EitherLog`] is their OR.
//!
//! The discipline, without which a write is lost:
//!
//! 1. [`harvest`](DirtyLog::harvest) collects the pages written so far;
//! 2. [`clear`](DirtyLog::clear) watches a page again **before** it is read;
//! 3. only pages that will be read next are cleared, or pages that the engine keeps as dirty until they are.
//!
//! A write after step 2 is seen by the next harvest; a write before it is in what is read. Bits that a
//! failed attempt consumed are gone, so every attempt begins with all pages dirty, or with all pages named
//! anew ([`InitiallyDirty`]).

mod bitmap;
mod error;
mod guarded;
mod kvm;
mod log;
mod part;
mod prefetch;
mod region;
mod software;
mod stripe;
mod stripes;
mod words;

unstable! { use bitmap::DirtyBitmap; }
pub use error::DirtyError;
pub use kvm::{KvmLog, KvmSlot};
pub use log::{CaughtUp, DirtyLog, InitiallyDirty};
unstable! { use part::DirtyPart; }
pub use region::DirtyRegion;
pub use software::{EitherLog, SoftwareLog, WrittenPages};
pub use sterna_bitmap::SoftwareBitmap;
unstable! { use stripe::{STRIPE_PAGES, Stripe}; }
unstable! { use stripes::Stripes; }
