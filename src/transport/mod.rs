//! Transports of pages.
//!
//! At the source a [`Transport`] has [`Lane`]s. One worker drives each lane, and the pages of one stripe of
//! RAM always take the same lane: its order makes the latest write of a page win. At the destination the
//! lanes end in a [`LaneReceiver`]. Its most important method is [`revoke`](LaneReceiver::revoke), after
//! which only this host can write to the guest.
//!
//! A [`TransportProvider`] makes both ends. The library has two providers, and neither copies a page on its
//! way: [`rdma`] writes pages one-sidedly, [`tcp`] sends them from and reads them into guest RAM by vectored
//! calls. A further transport needs an implementation of the trait and an entry in the list, [`Transports`],
//! at both hosts; the engine and the wire know a transport only by its name.

mod error;
#[cfg(test)]
pub(crate) mod faulty;
mod lane;
mod offer;
mod provider;
pub mod rdma;
mod receiver;
mod remains;
mod requests;
pub mod tcp;
mod transports;

pub use error::TransportError;
unstable! { use lane::{Lane, Registration, RegistrationCost, Transport}; }
pub(crate) use offer::{Offer, shown};
unstable! { use provider::{Destination, Source, SourceOffer, TransportProvider}; }
unstable! { use receiver::{LaneConnection, LaneConnections, LaneReceiver}; }
unstable! { use remains::{Leak, Remains}; }
unstable! { use requests::{await_answer, send_request}; }
pub use transports::Transports;
