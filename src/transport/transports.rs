//! The list of transports, in the order of the attempts.

use std::sync::Arc;

use super::error::TransportError;
use super::provider::{Destination, TransportProvider};
use super::rdma::RdmaProvider;
use super::receiver::LaneReceiver;
use super::tcp::TcpProvider;
use crate::wire::{LaneOffer, Refusal};

/// Transports by name, in the order in which a source tries them. A list of one is a choice by name. At a
/// destination the order means nothing: the source's offer names the transport.
///
/// By default RDMA comes first, with its default tuning, and TCP second.
#[derive(Clone, Debug)]
pub struct Transports(Vec<Arc<dyn TransportProvider>>);

impl Default for Transports {
    fn default() -> Self {
        Self::from(RdmaProvider::default()).then(TcpProvider)
    }
}

/// A list of one.
impl<P: TransportProvider + 'static> From<P> for Transports {
    fn from(provider: P) -> Self {
        Self(vec![Arc::new(provider)])
    }
}

impl Transports {
    /// The same list, with one more at the end. Of two with the same name a destination uses the first.
    #[must_use]
    pub fn then(mut self, provider: impl TransportProvider + 'static) -> Self {
        self.0.push(Arc::new(provider));
        self
    }

    /// A list of the transport with this name only.
    ///
    /// # Errors
    /// [`TransportError::Unknown`] if no transport has the name.
    pub fn only(&self, scheme: &str) -> Result<Self, TransportError> {
        Ok(Self(vec![self.named(scheme)?.clone()]))
    }

    /// The names, in order.
    pub fn schemes(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|provider| provider.scheme())
    }

    /// The number of transports, at least one.
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// The name of the transport after this position, if any.
    pub(crate) fn behind(&self, place: usize) -> Option<&str> {
        self.0.get(place + 1).map(|provider| provider.scheme())
    }

    /// The transports from this position on.
    pub(super) fn at_and_behind(
        &self,
        place: usize,
    ) -> impl Iterator<Item = (usize, &Arc<dyn TransportProvider>)> {
        self.0.iter().enumerate().skip(place)
    }

    /// The transport with this name.
    pub(crate) fn named(&self, scheme: &str) -> Result<&Arc<dyn TransportProvider>, TransportError> {
        let named = self.0.iter().find(|provider| provider.scheme() == scheme);
        named.ok_or_else(|| TransportError::Unknown {
            scheme: scheme.to_owned(),
            known: self.schemes().collect::<Vec<_>>().join(", "),
        })
    }

    /// Makes the destination's ends for the lanes that a source offers, or refuses.
    pub(crate) fn receive(
        &self,
        offer: &LaneOffer,
        destination: &Destination<'_>,
    ) -> Result<Box<dyn LaneReceiver>, Refusal> {
        let received = self.named(&offer.scheme).and_then(|provider| provider.receive(offer, destination));
        received.map_err(|error| match error {
            // A sound source would not send these bytes: another transport would hide the defect.
            TransportError::Wire(error) => Refusal::Incompatible(error.to_string()),
            error => Refusal::Transport(error.to_string()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_by_name_is_a_list_of_one_and_names_what_there_is_else() {
        let all = Transports::default();
        assert_eq!(all.schemes().collect::<Vec<_>>(), ["rdma", "tcp"]);
        assert_eq!(all.only("tcp").unwrap().schemes().collect::<Vec<_>>(), ["tcp"]);
        let unknown = all.only("pigeon").unwrap_err().to_string();
        assert!(unknown.contains("pigeon") && unknown.contains("rdma, tcp"), "{unknown}");
    }
}
