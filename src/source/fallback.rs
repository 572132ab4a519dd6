//! When the lanes fail while the guest runs: a new attempt over the next transport in the list.

use super::error::MigrationFailure;
use super::precopy::Precopy;
use super::prepare::hello;
use crate::progress::Event;

impl Precopy<'_> {
    /// Sends rounds until the rest fits the downtime. If the device or the network breaks the lanes, the
    /// rounds begin anew over the next transport in the list.
    pub(super) fn converge_over_any_lanes(&mut self) -> Result<(), MigrationFailure> {
        loop {
            let converged = self.converge();
            let link = &mut self.connected.link;
            let cause = match converged.and_then(|()| Ok(link.register_ahead(&self.pages.dirty)?)) {
                Err(MigrationFailure::Transport(cause)) => cause,
                converged => return converged,
            };
            let Some(to) = link.falls_back_to(&cause).map(str::to_owned) else { return Err(cause.into()) };
            self.migration.options.cancel.check()?;
            self.fall_back(to, &cause.to_string())?;
        }
    }

    /// Starts a new attempt on the same control channel. The destination discards what has arrived. At the
    /// source every page is dirty or named again, because the bits of the pages already sent are consumed.
    fn fall_back(&mut self, to: String, why: &str) -> Result<(), MigrationFailure> {
        let migration = self.migration;
        let from = self.connected.link.scheme.clone();
        migration.observer.event(&Event::FellBack { from, to, why: why.to_owned() });
        if self.steering.history.throttle_percent() > 0 {
            self.steering.throttle(migration, 0);
        }
        self.connected.log.stop()?;
        let link = &mut self.connected.link;
        let opening = hello(migration, link.ram.layout())?;
        link.fall_back(why.to_owned(), &migration.options.cancel, opening)?;
        migration.observer.event(&link.connected());
        self.connected.handover.begin_anew(link.attempt_id)?;
        self.steering.begin_anew(link);
        self.pages.begin_anew(link, migration.options.verify);
        (self.hash_next, self.paused_since) = (false, None);
        let initially = self.connected.log.start()?;
        self.pages.begin(initially, &self.connected.link);
        Ok(())
    }
}
