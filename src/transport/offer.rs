use std::thread;

#[cfg(test)]
use super::faulty::{self, FaultyOffer, FaultyReceiver};
use super::rdma::{RdmaOffer, RdmaPath, RdmaReceiver, RdmaTuning};
use super::tcp::{TcpReceiver, TcpTransport};
use super::{LaneReceiver, Transport, TransportError, TransportKind};
use crate::control::ControlChannel;
use crate::memory::GuestRam;
use crate::wire::{LaneOffer, LaneReady};

/// Which transport the operator wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TransportChoice {
    /// A hardware RDMA device that has the address from which the peer is reached, else a soft-RoCE one, else TCP.
    #[default]
    Auto,
    /// TCP.
    Tcp,
    /// RDMA, or nothing.
    Rdma,
}

/// The source's end of the lanes before the destination has answered.
#[derive(Debug)]
pub struct Offer {
    kind: OfferKind,
    reason: String,
    any_device: bool,
}

#[derive(Debug)]
enum OfferKind {
    Tcp(u8),
    Rdma(RdmaOffer),
    #[cfg(test)]
    Faulty(FaultyOffer),
}

impl Offer {
    /// Chooses a transport to the peer of `control` and makes its local end for so many lanes, at most 64; `None`: as many as
    /// suit the transport.
    ///
    /// # Errors
    /// [`TransportError`] if the operator's choice cannot be had. [`TransportChoice::Auto`] falls back to TCP instead.
    pub fn make(
        choice: TransportChoice,
        control: &ControlChannel,
        ram: &GuestRam,
        lanes: Option<u8>,
        tuning: RdmaTuning,
    ) -> Result<Self, TransportError> {
        let any_device = choice == TransportChoice::Rdma;
        let rdma_lanes = at_most_64(lanes.unwrap_or(RDMA_LANES));
        #[cfg(test)]
        if let Some(faults) = faulty::lanes_here() {
            let kind = OfferKind::Faulty(FaultyOffer::new(choice, rdma_lanes, faults));
            return Ok(Self { kind, reason: "a test wants them".into(), any_device });
        }
        let rdma = || {
            let path = RdmaPath::find(control.local_ip(), any_device)?;
            RdmaOffer::make(path, ram, rdma_lanes, tuning, any_device)
        };
        let offered = |offer, reason: &str| Self {
            kind: OfferKind::Rdma(offer),
            reason: reason.to_owned(),
            any_device,
        };
        match choice {
            TransportChoice::Tcp => Ok(Self::tcp(lanes, "TCP was asked for".into())),
            TransportChoice::Rdma => Ok(offered(rdma()?, "RDMA was asked for")),
            TransportChoice::Auto => Ok(match rdma() {
                Ok(offer) => offered(offer, "an RDMA device has the address that reaches the peer"),
                Err(TransportError::NoDevice { .. }) => {
                    Self::tcp(lanes, "no RDMA device of this host reaches the peer".into())
                }
                Err(error) => Self::tcp(lanes, format!("no RDMA: {error}")),
            }),
        }
    }

    /// TCP, for this reason, over so many lanes, at most 64; `None`: as many as suit it.
    #[must_use]
    pub fn tcp(lanes: Option<u8>, reason: String) -> Self {
        let lanes = at_most_64(lanes.unwrap_or_else(tcp_lanes));
        Self { kind: OfferKind::Tcp(lanes), reason, any_device: false }
    }

    /// Which kind was chosen.
    #[must_use]
    pub fn kind(&self) -> TransportKind {
        match self.kind {
            OfferKind::Tcp(_) => TransportKind::Tcp,
            OfferKind::Rdma(_) => TransportKind::Rdma,
            #[cfg(test)]
            OfferKind::Faulty(ref offer) => offer.kind(),
        }
    }

    /// Over how many lanes.
    #[must_use]
    pub fn count(&self) -> u8 {
        match &self.kind {
            OfferKind::Tcp(lanes) => *lanes,
            OfferKind::Rdma(offer) => offer.count(),
            #[cfg(test)]
            OfferKind::Faulty(offer) => offer.lanes(),
        }
    }

    /// Why, for people.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// What to tell the destination.
    #[must_use]
    pub fn lanes(&self) -> LaneOffer {
        match &self.kind {
            OfferKind::Tcp(lanes) => LaneOffer::Tcp(*lanes),
            OfferKind::Rdma(offer) => {
                LaneOffer::Rdma { endpoints: offer.endpoints(), any_device: self.any_device }
            }
            #[cfg(test)]
            OfferKind::Faulty(offer) => LaneOffer::Tcp(offer.lanes()),
        }
    }

    /// Connects the lanes to what the destination has made for them.
    ///
    /// # Errors
    /// [`TransportError`] if they do not connect, or if the answer does not fit the offer.
    pub fn connect(
        self,
        ready: LaneReady,
        control: &ControlChannel,
        ram: &GuestRam,
    ) -> Result<Box<dyn Transport>, TransportError> {
        match (self.kind, ready) {
            (OfferKind::Tcp(lanes), LaneReady::Tcp(token)) => {
                Ok(Box::new(TcpTransport::connect(control, lanes, token, ram)?))
            }
            (OfferKind::Rdma(offer), LaneReady::Rdma { endpoints, pin_max_bytes }) => {
                Ok(Box::new(offer.connect(&endpoints, pin_max_bytes, &control.liveness())?))
            }
            #[cfg(test)]
            (OfferKind::Faulty(offer), LaneReady::Tcp(token)) => {
                Ok(Box::new(offer.connect(control, token, ram)?))
            }
            _ => Err(TransportError::Disagreement("one side speaks of TCP, the other of RDMA".into())),
        }
    }
}

/// The work of a queue pair is the adapter's, or that of the kernel's threads, not the lane's: four keep either busy, also for fewer
/// processors, where they are as fast as one.
const RDMA_LANES: u8 = 4;

/// A stream's work is done by its sender: more than processors cannot help, and four fill most links.
fn tcp_lanes() -> u8 {
    let processors = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u8::try_from(processors.min(4)).unwrap_or(4)
}

/// What a destination accepts.
fn at_most_64(lanes: u8) -> u8 {
    lanes.clamp(1, 64)
}

/// Makes the destination's end for the lanes that a source offers. RDMA has at most `pin_max_bytes` of RAM registered at
/// once; `None`: as much as this process may lock.
///
/// # Errors
/// [`TransportError`] if this host has no such transport, or may not pin so much memory.
pub fn land(
    offer: &LaneOffer,
    control: &ControlChannel,
    ram: &GuestRam,
    pin_max_bytes: Option<u64>,
) -> Result<Box<dyn LaneReceiver>, TransportError> {
    match offer {
        LaneOffer::Tcp(lanes) => {
            let lane_receiver = TcpReceiver::new(*lanes, ram, control.liveness())?;
            #[cfg(test)]
            if let Some(faults) = faulty::lane_receiver_here() {
                return Ok(Box::new(FaultyReceiver::new(lane_receiver, faults)));
            }
            Ok(Box::new(lane_receiver))
        }
        LaneOffer::Rdma { endpoints, any_device } => {
            let path = RdmaPath::find(control.local_ip(), *any_device)?;
            Ok(Box::new(RdmaReceiver::make(&path, ram, endpoints, pin_max_bytes, *any_device)?))
        }
    }
}
