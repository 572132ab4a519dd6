//! Pages over TCP: several streams, vectored writes straight from guest RAM and reads straight into it.
//!
//! A frame is a head, a list of runs, and the bytes of their pages. The peer acknowledges only the fence that
//! closes a round.

mod encrypted;
mod lane;
mod provider;
mod receiver;
mod stall;
mod transport;

#[cfg(test)]
pub(crate) use lane::TcpLane;
pub use provider::TcpProvider;
#[cfg(test)]
pub(crate) use receiver::TcpReceiver;
