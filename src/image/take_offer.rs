//! What an offer does before lanes connect, for fuzz targets.

use super::StoreError;
use super::store::{Partial, Store};
use crate::memory::GuestRam;
use crate::wire::ImageOffer;

/// Opens the file for an offer and maps its parts, as a receiver does.
pub(crate) fn take_offer(store: &Store, offer: &ImageOffer) -> Result<(), StoreError> {
    let mut partial = Partial::open(store, offer, false)?;
    let mapped = match &offer.content {
        Some(content) => partial.map(&content.parts).map(|mapping| {
            let _ = GuestRam::from_mapping(&mapping, &content.parts);
        }),
        None => partial.clear(),
    };
    partial.abandon_if_empty();
    mapped
}
