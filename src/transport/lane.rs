//! The source's end of the lanes.

use std::fmt::Debug;
use std::time::Duration;

use super::error::TransportError;
use crate::control::ControlChannel;
use crate::dirty::DirtyBitmap;
use crate::memory::PageRun;

/// The source's end of all lanes.
pub trait Transport: Send + Debug {
    /// The device or the addresses in use, for people.
    fn via(&self) -> String;

    /// How many lanes there are.
    fn count(&self) -> usize;

    /// The expected registration of memory, if these pages are the last to be sent.
    fn registration_expected(&self, _dirty: &DirtyBitmap) -> RegistrationCost {
        RegistrationCost::default()
    }

    /// The longest time that a lane waited, in the latest round, for memory to be registered.
    fn waited(&self) -> Duration {
        Duration::ZERO
    }

    /// Begins a round: returns the lanes, each for one worker, and the registration that must run beside
    /// them, if any. A transport counts these calls: in the first round, memory without data is left out. The
    /// number of lanes is always that of the [offer](super::SourceOffer::lanes).
    fn begin_round(&mut self) -> (&mut [Box<dyn Lane>], Option<&dyn Registration>);
}

/// The duration of registering memory for a last round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegistrationCost {
    /// The part that can be [prepared](Registration::prepare) while the guest runs.
    pub ahead: Duration,
    /// The part that cannot, because the limit on registered memory is lower: the lanes wait for it while the
    /// guest is paused.
    pub paused: Duration,
}

/// Registers memory while the lanes send, because registering everything first would take too long.
pub trait Registration: Sync {
    /// Works ahead of the lanes of a round that sends these pages, until [`end`](Self::end). Lanes that need
    /// memory that is not registered yet wait for it, and fail if this fails. `control` carries
    /// [requests](super::send_request) to the destination's [`LaneReceiver`](super::LaneReceiver::handle);
    /// take each answer before returning.
    ///
    /// # Errors
    /// [`TransportError`]; the attempt is over.
    fn run(&self, dirty: &DirtyBitmap, control: &mut ControlChannel) -> Result<(), TransportError>;

    /// Registers memory for sending these pages before a round, and so without lanes, as far as the limit
    /// allows.
    ///
    /// # Errors
    /// [`TransportError`]; the attempt is over.
    fn prepare(&self, _dirty: &DirtyBitmap, _control: &mut ControlChannel) -> Result<(), TransportError> {
        Ok(())
    }

    /// The lanes of the round have finished, or failed.
    fn end(&self);
}

/// One ordered stream of pages.
pub trait Lane: Send + Debug {
    /// Sends these pages as they are when they leave, which may be after this call returns. Waits when too
    /// much is in flight.
    ///
    /// # Errors
    /// [`TransportError`]; the attempt is over.
    fn write(&mut self, run: PageRun) -> Result<(), TransportError>;

    /// Closes a round: returns once all earlier writes on this lane are in the destination's RAM.
    ///
    /// # Errors
    /// [`TransportError`]; the attempt is over.
    fn fence(&mut self, round: u32) -> Result<(), TransportError>;

    /// How long the lane has waited so far for its [`Registration`]: time that does not count against the
    /// link.
    fn waited(&self) -> Duration;
}

/// `1 lane`, `2 lanes`: a number of things, for people.
pub(super) fn count(number: usize, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}
