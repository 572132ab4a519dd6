//! The source's end of the lanes.

use std::fmt::Debug;
use std::time::Duration;

use super::error::TransportError;
use crate::control::ControlChannel;
use crate::dirty::DirtyBitmap;
use crate::memory::PageRun;

/// The source's end of all lanes.
pub trait Transport: Send + Debug {
    /// The device or the addresses used, for people.
    fn via(&self) -> String;

    /// What is expected of the registration of memory, if these pages are the last to be sent.
    fn registration_expected(&self, _dirty: &DirtyBitmap) -> RegistrationCost {
        RegistrationCost::default()
    }

    /// How long the lane that waited longest, in the round that was begun last, waited for memory to be registered.
    fn waited(&self) -> Duration {
        Duration::ZERO
    }

    /// Begins a round: the lanes, each for one worker, and what must run beside them while they send, if anything must. There
    /// are always as many lanes as the [offer](super::SourceOffer::lanes) said.
    fn parts(&mut self) -> (&mut [Box<dyn Lane>], Option<&dyn Registration>);
}

/// How long registration of memory takes for a last round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegistrationCost {
    /// What can be [prepared](Registration::prepare) while the guest runs.
    pub ahead: Duration,
    /// What cannot, as not so much may be registered at once: the lanes wait for it while the guest is paused.
    pub paused: Duration,
}

/// Makes ready what lanes need, while they send: the registration of memory, which takes too long to wait for.
pub trait Registration: Sync {
    /// Works ahead of the lanes of a round in which these pages are sent, until [`end`](Self::end). Lanes that need what
    /// is not ready yet wait for it, and fail if this does. `control` is for [requests](super::send_request) to the destination's
    /// [`LaneReceiver`](super::LaneReceiver::handle); each answer must be taken before this returns.
    ///
    /// # Errors
    /// [`TransportError`]; the attempt is over.
    fn run(&self, dirty: &DirtyBitmap, control: &mut ControlChannel) -> Result<(), TransportError>;

    /// Makes ready, before a round and so without lanes, as much as there is room for of what sending these pages needs.
    ///
    /// # Errors
    /// [`TransportError`]; the attempt is over.
    fn prepare(&self, _dirty: &DirtyBitmap, _control: &mut ControlChannel) -> Result<(), TransportError> {
        Ok(())
    }

    /// The lanes of the round are done, or have failed.
    fn end(&self);
}

/// One ordered stream of pages.
pub trait Lane: Send + Debug {
    /// Sends these pages as they are when they leave, which may be later than the return of this call. Waits when too much
    /// is on its way.
    ///
    /// # Errors
    /// [`TransportError`]; the attempt is over.
    fn write(&mut self, run: PageRun) -> Result<(), TransportError>;

    /// Closes a round: returns once all that was written on this lane before is in the destination's RAM.
    ///
    /// # Errors
    /// [`TransportError`]; the attempt is over.
    fn fence(&mut self, round: u32) -> Result<(), TransportError>;

    /// How long it has waited so far for what a [`Registration`] had not ready: time in which the link was not to blame.
    fn waited(&self) -> Duration;
}

/// `1 lane`, `2 lanes`: a number of things, for people.
pub(super) fn count(number: usize, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}
