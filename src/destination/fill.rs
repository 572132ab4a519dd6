//! Steps 2 and 3: pages arrive, and the source's requests are answered until FINAL.

use super::arriving::Arriving;
use super::error::ReceiveError;
use super::prepare::Prepared;
use crate::control::ControlChannel;
use crate::guest::DestinationGuest;
use crate::panics::caught_or;
use crate::progress::Event;
use crate::saved_state::ArrivedState;
use crate::session::{answer_rounds, await_other_lanes, out_of_turn};
use crate::verify::DestinationDigests;
use crate::wire::{BlockDigests, Final, Message};

/// A guest with every page and all of its saved state.
pub(super) struct Filled<'attempt, G> {
    pub(super) arriving: Arriving<'attempt, G>,
    pub(super) filling: Filling,
}

/// What has arrived besides the pages.
pub(super) struct Filling {
    /// The digests of RAM to compare.
    pub(super) digests: DestinationDigests,
    pub(super) state: ArrivedState,
    pub(super) last: Final,
}

impl<'attempt, G: DestinationGuest> Prepared<'attempt, G> {
    /// Receives pages and state until FINAL.
    ///
    /// # Errors
    /// [`ReceiveError::LanesFailed`] if the source begins anew over other lanes: the memory of this attempt
    /// is freed. After any other the guest is given up.
    pub(super) fn fill(mut self, control: &mut ControlChannel) -> Result<Filled<'attempt, G>, ReceiveError> {
        let ended = caught_or(|| self.answer(control));
        let Self { mut arriving, digests, mut state } = self;
        let ended = match ended {
            Err(ReceiveError::Transport(error)) if error.may_fall_back() => {
                arriving.lanes.take_access_away();
                arriving.lanes.release(arriving.guest.name());
                Err(await_other_lanes(control, arriving.handover.attempt_id(), &error).into())
            }
            ended => ended,
        };
        let filled = ended.and_then(|last| Ok((state.complete(last.state_bytes)?, last)));
        match filled {
            Ok((state, last)) => Ok(Filled { arriving, filling: Filling { digests, state, last } }),
            Err(error @ ReceiveError::LanesFailed(_)) => {
                arriving.discard();
                Err(error)
            }
            Err(error) => Err(arriving.give_up(control, error)),
        }
    }

    fn answer(&mut self, control: &mut ControlChannel) -> Result<Final, ReceiveError> {
        let Self { arriving, digests: checks, state } = self;
        let lane_receiver = arriving.lanes.open().ok_or(ReceiveError::OutOfTurn("pages after FINAL"))?;
        let observer = arriving.observer;
        let closed = |number| observer.event(&Event::RoundClosed { number });
        let guest = &arriving.guest;
        let check = || Ok(guest.can_arrive()?);
        answer_rounds((lane_receiver, control), check, closed, |control, message| {
            match message {
                Message::BlockDigests(BlockDigests { now, digests }) => {
                    checks.note(&digests)?;
                    if now {
                        control.send(&Message::Checked(checks.compare_now(&digests)?))?;
                    }
                }
                Message::State(frame) => state.push(frame)?,
                other => return Err(out_of_turn(other).into()),
            }
            Ok(())
        })
    }
}
