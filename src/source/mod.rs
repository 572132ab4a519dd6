//! The source's side of a migration, in five steps.
//!
//! | step | the source | the destination | leads to |
//! |---|---|---|---|
//! | 1 prepare | connect, describe the guest, connect the lanes | reserve all RAM, or refuse | `Prepared` |
//! | 2 bulk | send every touched page while the guest runs | nothing, under RDMA | |
//! | 3 rounds | send what was written meanwhile, again and again | the same | `Converged` |
//! | 4 switch | pause, send the rest and the state, GO | revoke, compare, load, run | `Switched` |
//! | 5 complete | release the guest | show that it lives | [`Report`] |
//!
//! Each step is a value that the next consumes, and gives the attempt up itself if it fails.
//!
//! After a failure before GO is sent, the guest runs on at the source. A later failure leaves it paused and
//! in doubt. The source then asks the destination for the outcome: `migrate` does so for a while, then the
//! holder of the [`Doubt`].

#[cfg(feature = "unstable")]
mod blackout;
mod complete;
mod doubt;
mod durable_handover;
mod error;
mod fallback;
mod give_up;
mod hash_paused;
mod hash_running;
mod inside;
mod laps;
mod limits_handle;
mod migration;
mod options;
mod pages;
mod precopy;
mod prepare;
mod quota;
mod saving;
mod steering;
mod switch;
mod throttle;
mod verdict;
mod waiting;

use std::time::Instant;

#[cfg(feature = "unstable")]
#[doc(hidden)]
pub use blackout::Blackout;
pub use doubt::Doubt;
pub use error::{GuestIs, MigrationError, MigrationFailure};
unstable! { use error::StateLimit; }
pub use limits_handle::LimitsHandle;
pub use options::Options;
pub use verdict::{OpenError, StillInDoubt, Verdict};
#[cfg(test)]
pub(crate) use waiting::mutant;

use self::migration::Migration;
use self::prepare::Prepared;
pub use crate::control::ControlError;
use crate::guest::SourceGuest;
use crate::progress::{Observer, Report};
pub use crate::session::Cancel;
use crate::session::Sheltered;
use crate::state::GuestClaim;
pub use crate::verify::Verify;

/// Moves a running guest to the destination that listens at `to` (`HOST:PORT`), and returns once the guest
/// runs at the destination: the source's guest is then paused for good, and its VMM should destroy it.
///
/// `claim` is the claim of the guest's name on this host, which its VMM has had since before the guest
/// started: [`HostState::start`](crate::state::HostState::start) returns one for a new guest, an
/// [`Arrival`](crate::destination::Arrival) contains one. The migration records in it that the guest is given
/// away, before it gives the guest away.
///
/// It does not panic: a panic of its own, of the VMM's code or of the lanes is a
/// [failure](MigrationFailure::Panicked) like any other. An observer that panics gets no more events, and the
/// migration continues.
///
/// # Errors
/// [`MigrationError`], which says where the guest is. Unless the guest is in doubt, migrating again may
/// succeed.
pub fn migrate(
    guest: &dyn SourceGuest,
    claim: &GuestClaim,
    to: &str,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Report, MigrationError> {
    let observer = &Sheltered::new(observer);
    let migration = Migration { guest, options, observer, started: Instant::now() };
    let prepared = Prepared::new(migration, claim, to)?;
    let converged = prepared.precopy()?;
    let switched = converged.switch()?;
    Ok(switched.complete())
}
