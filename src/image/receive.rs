//! The destination's side.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::thread;

use super::blocks::image_digest;
use super::digest::ImageDigest;
use super::error::StoreError;
use super::extents::BLOCK_BYTES;
use super::store::{Partial, Store};
use crate::control::{ControlChannel, Security};
use crate::digest::{Digest, blocks};
use crate::memory::{GuestRam, RamLayout};
use crate::panics::{Panicked, caught_or};
use crate::session::{
    Cancel, Listener, SessionError, answer_rounds, await_other_lanes, explain_lanes, next_opening,
    out_of_turn, prepare_any,
};
use crate::state::HostState;
use crate::transport::{Destination, LaneReceiver, Transports};
use crate::wire::{DIGESTS_MAX, Final, ImageOffer, LaneReady, Message, Refusal, SwitchCosts};

/// A file that has arrived completely.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its path.
    pub path: PathBuf,
    /// The source's address.
    pub from: SocketAddr,
    /// Its length.
    pub len_bytes: u64,
    /// The digest that both ends computed.
    pub digest: ImageDigest,
}

/// A socket at which files may arrive.
#[derive(Debug)]
pub struct Receiver {
    listener: Listener,
    transports: Transports,
}

impl Receiver {
    /// Receives at a listening socket, in blocking mode, by these transports.
    #[must_use]
    pub fn from_listener(listener: TcpListener, transports: Transports) -> Self {
        // No source asks for the outcome of a file.
        let listener = Listener::new(listener, HostState::lost_with_this_process());
        Self { listener, transports }
    }

    /// The same receiver, at which files of other hosts may arrive, too.
    #[must_use]
    pub fn protected_by(self, security: Security) -> Self {
        self.listener.protect_by(security);
        self
    }

    /// Waits for a file, and returns once it is stored with a digest equal to the source's.
    ///
    /// # Errors
    /// [`StoreError`] if a file was refused, or did not arrive. The data that arrived is kept in
    /// `NAME.sterna-partial` beside the target, and the next attempt resumes from it. The receiver may be
    /// used again.
    pub fn receive(&self, store: &Store, cancel: &Cancel) -> Result<Stored, StoreError> {
        let (mut control, mut offer): (_, ImageOffer) = self.listener.await_opening(cancel)?;
        let from = control.peer_address();
        cancel.ends_waits_for(control.liveness())?;
        loop {
            let arriving = prepare_any(&mut offer, &mut control, |offer, control| {
                tracing::info!("{:?} is offered by {from}", offer.name);
                self.prepare_image(store, offer, control)
            })?;
            match arriving.run(&offer, &mut control) {
                Ok((path, digest)) => return Ok(Stored { path, from, len_bytes: offer.len_bytes, digest }),
                // The data that has arrived stays, and the next lanes continue.
                Err(StoreError::Transfer(SessionError::LanesFailed(reason))) => {
                    tracing::warn!("{:?} continues over other lanes: {reason}", offer.name);
                    offer = next_opening(&mut control)?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Opens the file and makes the lanes' ends, or refuses.
    fn prepare_image(
        &self,
        store: &Store,
        offer: &ImageOffer,
        control: &mut ControlChannel,
    ) -> Result<Incoming, StoreError> {
        let pins_memory = match &offer.content {
            Some(content) => {
                let provider = self.transports.named(&content.lanes.scheme);
                provider.map_err(|error| Refusal::Transport(error.to_string()))?.pins_memory()
            }
            None => false,
        };
        let mut partial = Partial::open(store, offer, pins_memory)?;
        let lane_receiver =
            self.land_image(&mut partial, offer, control).inspect_err(|_| partial.abandon_if_empty())?;
        Ok(Incoming { partial, lane_receiver })
    }

    fn land_image(
        &self,
        partial: &mut Partial,
        offer: &ImageOffer,
        control: &mut ControlChannel,
    ) -> Result<Option<Box<dyn LaneReceiver>>, StoreError> {
        let Some(content) = &offer.content else {
            partial.clear()?;
            return Ok(None);
        };
        if content.parts.regions.iter().any(|part| !part.guest_address.is_multiple_of(BLOCK_BYTES)) {
            return Err(Refusal::Image("its parts are not made of blocks of 2 MiB".into()).into());
        }
        let ram = GuestRam::from_mapping(&partial.map(&content.parts)?, &content.parts)
            .map_err(SessionError::from)?;
        let mut lane_receiver =
            self.transports.receive(&content.lanes, &Destination { control, ram: &ram })?;
        let lanes = self.listener.lanes(lane_receiver.token(), control.identity());
        let ready = LaneReady { body: lane_receiver.ready()? };
        control.send(&Message::Ready(ready, SwitchCosts::default()))?;
        lane_receiver.connect(&lanes).map_err(|error| explain_lanes(error, control))?;
        Ok(Some(lane_receiver))
    }
}

/// A file in transfer.
struct Incoming {
    partial: Partial,
    lane_receiver: Option<Box<dyn LaneReceiver>>,
}

impl Incoming {
    fn run(
        mut self,
        offer: &ImageOffer,
        control: &mut ControlChannel,
    ) -> Result<(PathBuf, ImageDigest), StoreError> {
        let none = RamLayout { regions: Vec::new() };
        let parts = offer.content.as_ref().map_or(&none, |content| &content.parts);
        let arrived = caught_or(|| self.take(offer, parts, control));
        // Nothing may write to the file any more, whatever the result.
        let arrived = self.revoke().and(arrived);
        let stored = match arrived {
            Ok(digests) => {
                self.partial.finish().map(|path| (path, image_digest(offer.len_bytes, parts, &digests)))
            }
            Err(error) => {
                self.partial.abandon_if_empty();
                // On a full file system a lane only reports that it could not write.
                Err(match error {
                    StoreError::Transfer(_) if self.partial.is_full() => {
                        StoreError::Full { path: self.partial.path().to_owned() }
                    }
                    error => error,
                })
            }
        };
        if let Err(StoreError::Transfer(SessionError::LanesFailed(_))) = &stored {
            return stored;
        }
        // The source may be gone.
        let told = control.send(&match &stored {
            Ok(_) => Message::Stored(offer.attempt_id),
            Err(error) => Message::Abort(offer.attempt_id, error.to_string()),
        });
        if let (Ok(_), Err(error)) = (&stored, told) {
            tracing::warn!("the file is stored, but the source could not be informed: {error}");
        }
        stored
    }

    /// Receives the blocks and compares them; returns their digests.
    fn take(
        &mut self,
        offer: &ImageOffer,
        parts: &RamLayout,
        control: &mut ControlChannel,
    ) -> Result<Vec<Digest>, StoreError> {
        let held = match self.lane_receiver {
            Some(_) if self.partial.held => self.partial.digests(parts)?,
            _ => Vec::new(),
        };
        if held.is_empty() {
            control.send(&Message::Digests(held))?;
        } else {
            held.chunks(DIGESTS_MAX).try_for_each(|part| control.send(&Message::Digests(part.to_vec())))?;
        }
        let last = match self.await_final(control) {
            Err(StoreError::Transfer(SessionError::Transport(error))) if error.may_fall_back() => {
                self.revoke()?;
                return Err(await_other_lanes(control, offer.attempt_id, &error).into());
            }
            last => last?,
        };
        let count = blocks(parts).len();
        if last.attempt_id != offer.attempt_id || last.compare_blocks != count as u64 {
            return Err(SessionError::OutOfTurn("a FINAL of something else").into());
        }
        self.revoke()?;
        // In parallel: the source sends its digests when they are ready, and a connection that is not read
        // counts as dead.
        let (ours, theirs) = thread::scope(|scope| {
            let theirs = scope.spawn(|| await_digests(count, control));
            let ours = self.partial.digests_and_holes(parts);
            (ours, theirs.join().unwrap_or_else(|panic| Err(Panicked::from(panic).into())))
        });
        let (ours, theirs) = (ours?, theirs?);
        match ours.iter().zip(&theirs).filter(|(ours, theirs)| ours != theirs).count() {
            0 => Ok(ours),
            blocks => Err(StoreError::Differs { blocks, of: count, path: self.partial.path().to_owned() }),
        }
    }

    /// Revokes all remote access. If a device does not release the file, the file is discarded, so that no
    /// later attempt shares its pages.
    fn revoke(&mut self) -> Result<(), StoreError> {
        let Some(lane_receiver) = self.lane_receiver.take() else { return Ok(()) };
        let remains = lane_receiver.revoke().inspect_err(|_| self.partial.discard())?;
        if let Err(leak) = remains.release() {
            tracing::warn!("{}: {leak}", self.partial.path().display());
        }
        Ok(())
    }

    fn await_final(&mut self, control: &mut ControlChannel) -> Result<Final, StoreError> {
        if let Some(lane_receiver) = &mut self.lane_receiver {
            return answer_rounds(
                (lane_receiver.as_mut(), control),
                || Ok(()),
                |_| {},
                |_, other| Err(out_of_turn(other).into()),
            );
        }
        match control.receive("FINAL", None)? {
            Message::Final(last) => Ok(last),
            other => Err(out_of_turn(other).into()),
        }
    }
}

/// The digests of the source's blocks, which it computes while this side computes its own.
fn await_digests(count: usize, control: &mut ControlChannel) -> Result<Vec<Digest>, StoreError> {
    let mut digests = Vec::new();
    while digests.len() < count {
        // Keepalives show that the source is alive.
        match control.receive("digests", None)? {
            Message::Digests(more) if !more.is_empty() && digests.len() + more.len() <= count => {
                digests.extend(more);
            }
            other => return Err(out_of_turn(other).into()),
        }
    }
    Ok(digests)
}
