//! When RDMA fails while the guest runs: once more from the beginning, over TCP.

use super::error::MigrationFailure;
use super::precopy::Precopy;
use super::prepare::hello;
use crate::progress::Event;

impl Precopy<'_> {
    /// Sends rounds until the rest fits the downtime. If the device or the network takes the RDMA lanes away meanwhile, and RDMA
    /// was not asked for by name, they begin anew over TCP.
    pub(super) fn converge_over_any_lanes(&mut self) -> Result<(), MigrationFailure> {
        loop {
            let converged = self.converge();
            match converged.and_then(|()| Ok(self.connected.link.register_ahead(&self.pages.dirty)?)) {
                Err(MigrationFailure::Transport(cause)) if self.connected.link.may_fall_back(&cause) => {
                    self.migration.options.cancel.check()?;
                    self.fall_back(&cause.to_string())?;
                }
                converged => return converged,
            }
        }
    }

    /// A new attempt on the same control channel. The destination discards what has arrived; at the source every page is dirty
    /// again, since the bits of those that were sent are consumed.
    fn fall_back(&mut self, why: &str) -> Result<(), MigrationFailure> {
        let migration = self.migration;
        migration.observer.event(&Event::FellBack { why: why.to_owned() });
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
        self.hash_next = false;
        self.connected.log.start()?;
        Ok(())
    }
}
