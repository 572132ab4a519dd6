//! The choice of a transport from the list.

use super::error::TransportError;
use super::lane::Transport;
use super::provider::{Source, SourceOffer};
use super::transports::Transports;
use crate::control::ControlChannel;
use crate::memory::GuestRam;
use crate::wire::{LANES_MAX, LaneOffer, LaneReady};

/// The source's ends of the lanes of one transport in a list, before the destination has answered.
#[derive(Debug)]
pub(crate) struct Offer {
    /// Its position in the list.
    place: usize,
    lanes: LaneOffer,
    reason: String,
    ends: Box<dyn SourceOffer>,
}

impl Offer {
    /// Makes the ends of the first transport in the list by which this host reaches the peer of `control`.
    pub(crate) fn first(
        transports: &Transports,
        control: &ControlChannel,
        ram: &GuestRam,
        lanes: Option<u8>,
    ) -> Result<Self, TransportError> {
        Self::from_place(0, transports, (control, ram, lanes), None)
    }

    /// The same, from the position after `after` in the list, because the transport at `after` failed.
    pub(crate) fn next(
        after: usize,
        transports: &Transports,
        (control, ram, lanes): (&ControlChannel, &GuestRam, Option<u8>),
        reason: String,
    ) -> Result<Self, TransportError> {
        Self::from_place(after + 1, transports, (control, ram, lanes), Some(reason))
    }

    fn from_place(
        first: usize,
        transports: &Transports,
        (control, ram, lanes): (&ControlChannel, &GuestRam, Option<u8>),
        mut reason: Option<String>,
    ) -> Result<Self, TransportError> {
        let by_name = transports.count() == 1;
        let lanes = lanes.map(|lanes| lanes.clamp(1, LANES_MAX));
        let mut failed = None;
        for (place, provider) in transports.at_and_behind(first) {
            let scheme = provider.scheme();
            let offered = provider
                .offer(&Source { control, ram, lanes, by_name })
                .and_then(|ends| Ok((described(scheme, ends.as_ref(), lanes)?, ends)));
            match offered {
                Ok((lanes, ends)) => {
                    let reason = reason.unwrap_or_else(|| {
                        if by_name { format!("{} was asked for", shown(scheme)) } else { ends.reason() }
                    });
                    return Ok(Self { place, lanes, reason, ends });
                }
                Err(error) => {
                    reason.get_or_insert_with(|| why_not(scheme, &error));
                    failed = Some(error);
                }
            }
        }
        Err(failed.unwrap_or(TransportError::NoneLeft))
    }

    /// Its position in the list.
    pub(crate) fn place(&self) -> usize {
        self.place
    }

    /// The transport's name.
    pub(crate) fn scheme(&self) -> &str {
        &self.lanes.scheme
    }

    /// The number of lanes.
    pub(crate) fn count(&self) -> u8 {
        self.lanes.lanes
    }

    /// Why this transport, for people.
    pub(crate) fn reason(&self) -> &str {
        &self.reason
    }

    /// The offer for HELLO.
    pub(crate) fn lanes(&self) -> LaneOffer {
        self.lanes.clone()
    }

    /// Connects the lanes to the destination's ends.
    pub(crate) fn connect(
        self,
        ready: &LaneReady,
        control: &ControlChannel,
        ram: &GuestRam,
    ) -> Result<Box<dyn Transport>, TransportError> {
        let count = usize::from(self.count());
        let transport = self.ends.connect(&ready.body, control, ram)?;
        // The number of workers and stripes is that of the offer.
        let made = transport.count();
        if made == count { Ok(transport) } else { Err(other_number(&self.lanes.scheme, count, made)) }
    }
}

/// The offer of these ends for HELLO, if it is within the bounds.
fn described(scheme: &str, ends: &dyn SourceOffer, asked: Option<u8>) -> Result<LaneOffer, TransportError> {
    let offer = LaneOffer { scheme: scheme.to_owned(), lanes: ends.lanes(), body: ends.body()? };
    offer.check_bounds()?;
    match asked {
        Some(asked) if asked != offer.lanes => Err(other_number(scheme, asked.into(), offer.lanes.into())),
        _ => Ok(offer),
    }
}

fn other_number(scheme: &str, asked: usize, made: usize) -> TransportError {
    TransportError::Provider {
        scheme: scheme.to_owned(),
        may_fall_back: false,
        error: format!("it has made {made} lanes where {asked} are needed").into(),
    }
}

/// Why a transport is unavailable, in fewer words than the error.
fn why_not(scheme: &str, error: &TransportError) -> String {
    match error {
        TransportError::NoDevice { .. } => "no RDMA device of this host reaches the peer".into(),
        error => format!("no {}: {error}", shown(scheme)),
    }
}

/// A transport's name, for people.
pub(crate) fn shown(scheme: &str) -> String {
    scheme.to_uppercase()
}
