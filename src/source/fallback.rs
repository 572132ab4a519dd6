//! When RDMA fails while the guest runs: once more from the beginning, over TCP.

use super::{Attempt, MigrationFailure, hello};
use crate::convergence::History;
use crate::lock::Lock;
use crate::progress::Event;
use crate::verify::SourceDigests;

impl Attempt<'_> {
    /// Steps 2 and 3. If the device or the network takes the RDMA lanes away meanwhile, and RDMA was not asked for by name, they
    /// begin anew over TCP.
    pub(super) fn converge_over_any_lanes(&mut self) -> Result<(), MigrationFailure> {
        loop {
            match self.converge().and_then(|()| Ok(self.link.register_ahead(&self.dirty)?)) {
                Err(MigrationFailure::Transport(cause)) if self.link.may_fall_back(&cause) => {
                    self.options.cancel.check()?;
                    self.fall_back(&cause.to_string())?;
                }
                converged => return converged,
            }
        }
    }

    /// A new attempt on the same control channel. The destination discards what has arrived; here every page is dirty again, since
    /// the bits of those that were sent are consumed.
    fn fall_back(&mut self, why: &str) -> Result<(), MigrationFailure> {
        self.observer.event(&Event::FellBack { why: why.to_owned() });
        if self.history.throttle_percent() > 0 {
            self.throttle(0);
        }
        self.log.stop()?;
        let lock = self.options.lock.as_ref().map(Lock::token).transpose()?;
        let opening = hello(self.guest, self.link.ram.layout(), lock, self.options.switch_cost.state_bytes)?;
        self.link.fall_back(why.to_owned(), &self.options.cancel, opening)?;
        self.observer.event(&self.link.connected());
        self.handover.begin_anew(self.link.attempt_id)?;
        self.history = History::new(self.link.control.round_trip());
        (self.rounds, self.pages_zero, self.first_page) = (Vec::new(), 0, None);
        (self.warned, self.warned_of_limit) = (false, false);
        (self.source_digests, self.hash_next) =
            (SourceDigests::new(&self.link.ram.layout(), self.options.verify), false);
        self.dirty.fill();
        self.log.start()?;
        Ok(())
    }
}
