//! Step 1: connects to the destination, describes the guest, and connects the lanes if the destination
//! accepts.

use sterna_trust::Right;

use super::durable_handover::{DurableHandover, Peer, open_records};
use super::error::{GuestIs, MigrationError, MigrationFailure};
use super::migration::{Connected, Migration};
use super::saving;
use crate::lock::Lock;
use crate::memory::RamLayout;
use crate::panics::caught_or;
use crate::progress::Event;
use crate::session::{FellBack, HeartbeatAt, Link};
use crate::state::GuestClaim;
use crate::wire::{AttemptId, Hello, LaneOffer, Message};

/// A destination that has reserved everything, before a page was sent.
pub(super) struct Prepared<'migration> {
    pub(super) migration: Migration<'migration>,
    pub(super) connected: Connected,
    /// The guest's beats per second meanwhile.
    pub(super) heartbeats_per_second: Option<f64>,
}

impl<'migration> Prepared<'migration> {
    /// Connects to the destination that listens at `to`.
    pub(super) fn new(
        migration: Migration<'migration>,
        claim: &GuestClaim,
        to: &str,
    ) -> Result<Self, MigrationError> {
        let Migration { guest, options, observer, .. } = migration;
        let first_beat = HeartbeatAt::now(guest);
        let connected = caught_or(|| connect(migration, claim, to)).map_err(|cause| {
            let cause = cause.explained(|cause| options.cancel.explain(cause));
            let refused = !matches!(cause, MigrationFailure::Cancelled);
            MigrationError { guest: GuestIs::RunningAtSource, refused, cause, doubt: None }
        })?;
        if let Some(FellBack { from, why }) = connected.link.fell_back.clone() {
            observer.event(&Event::FellBack { from, to: connected.link.scheme.clone(), why });
        }
        observer.event(&connected.link.connected());
        let heartbeats_per_second = first_beat.rate_until(HeartbeatAt::now(guest));
        Ok(Self { migration, connected, heartbeats_per_second })
    }
}

fn connect(migration: Migration<'_>, claim: &GuestClaim, to: &str) -> Result<Connected, MigrationFailure> {
    let Migration { guest, options, .. } = migration;
    let records = open_records(claim)?;
    let (ram, log) = (guest.ram()?, guest.dirty_log()?);
    let hello = hello(migration, ram.layout())?;
    let mut link = Link::make(
        ram,
        (to, (&options.security, Right::Receive)),
        (&options.transports, options.lanes),
        &options.cancel,
        hello,
    )?;
    saving::check_expected(&mut link, options)?;
    let control = &link.control;
    let peer =
        Peer { name: to.to_owned(), address: Some(control.peer_address()), identity: control.identity() };
    let arbiters = (options.security.clone(), options.lock.clone());
    let handover = DurableHandover::new(records, peer, link.attempt_id, arbiters);
    Ok(Connected { link, log, handover })
}

/// Describes the guest to a destination, for each attempt and offer of lanes.
pub(super) fn hello(
    Migration { guest, options, .. }: Migration<'_>,
    layout: RamLayout,
) -> Result<impl Fn(AttemptId, LaneOffer) -> Message, MigrationFailure> {
    let lock = options.lock.as_ref().map(Lock::token).transpose()?;
    let state_bytes = options.switch_cost.state_bytes;
    let (name, details) = (guest.name().to_owned(), guest.details()?);
    Ok(move |attempt_id, lanes| {
        let (name, ram, details) = (name.clone(), layout.clone(), details.clone());
        Message::Hello(Hello { attempt_id, name, ram, details, lanes, lock, state_bytes })
    })
}
