//! How far the channels of one migration are, and what they brought for the blob.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::multifd::error::{ChannelError, ChannelsError, PacketFault};
use crate::multifd::header::Init;
use crate::multifd::pages::{ChannelPages, Origin};

/// Shared by the threads of all channels.
#[derive(Debug)]
pub(crate) struct Progress {
    state: Mutex<State>,
    changed: Condvar,
    /// Packets of all channels.
    packets: AtomicU64,
    /// All pages were accounted for: none may follow.
    finished: AtomicBool,
    unshared_max_bytes: u64,
}

#[derive(Debug)]
struct State {
    channels: Vec<Channel>,
    uuid: Option<[u8; 16]>,
    pages: ChannelPages,
    failure: Option<ChannelError>,
}

#[derive(Clone, Debug, Default)]
struct Channel {
    connected: bool,
    ended: bool,
    syncs: u64,
}

impl Progress {
    pub(crate) fn new(channels: usize, unshared_max_bytes: u64) -> Self {
        let channels = vec![Channel::default(); channels];
        let state = State { channels, uuid: None, pages: ChannelPages::default(), failure: None };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            packets: AtomicU64::new(0),
            finished: AtomicBool::new(false),
            unshared_max_bytes,
        }
    }

    /// A channel has said which it is.
    pub(crate) fn connect(&self, init: Init) -> Result<(), PacketFault> {
        let mut state = self.lock();
        let channels = state.channels.len();
        match state.channels.get_mut(usize::from(init.number)) {
            Some(channel) if !channel.connected => channel.connected = true,
            _ => return Err(PacketFault::Number { number: init.number, channels }),
        }
        if *state.uuid.get_or_insert(init.uuid) != init.uuid {
            return Err(PacketFault::Uuid);
        }
        Ok(())
    }

    /// Keeps a page of a block that is not shared. `None` is a page of zeros.
    pub(crate) fn keep(
        &self,
        block: &str,
        offset: u64,
        bytes: Option<&[u8]>,
        origin: Origin,
    ) -> Result<(), PacketFault> {
        self.lock().pages.keep(block, offset, bytes, origin, self.unshared_max_bytes)
    }

    /// A packet was read to its end, and its pages are named.
    pub(crate) fn read_packet(&self, has_pages: bool) -> Result<(), PacketFault> {
        self.packets.fetch_add(1, Ordering::Relaxed);
        // Names come before this, and the harvest of all names after `finished`: what is false here was in
        // time.
        if has_pages && self.finished.load(Ordering::SeqCst) {
            return Err(PacketFault::AfterTheLast);
        }
        Ok(())
    }

    /// A SYNC packet was read.
    pub(crate) fn synced(&self, channel: u8) {
        if let Some(channel) = self.lock().channels.get_mut(usize::from(channel)) {
            channel.syncs += 1;
        }
        self.changed.notify_all();
    }

    /// A channel has ended. When all pages have come, QEMU may end it in any way.
    pub(crate) fn ended(
        &self,
        number: Option<u8>,
        result: Result<(), ChannelError>,
    ) -> Result<(), ChannelError> {
        let mut state = self.lock();
        if let Some(channel) = number.and_then(|number| state.channels.get_mut(usize::from(number))) {
            channel.ended = true;
        }
        let result = result.or_else(|error| match error.fault {
            PacketFault::Input(_) | PacketFault::Ends if self.finished.load(Ordering::SeqCst) => Ok(()),
            _ => Err(error),
        });
        if let Err(error) = &result {
            state.failure.get_or_insert_with(|| error.clone());
        }
        self.changed.notify_all();
        result
    }

    /// The first failure of a channel.
    pub(crate) fn failure(&self) -> Option<ChannelError> {
        self.lock().failure.clone()
    }

    /// Waits until each channel has had so many SYNC packets, and takes the pages.
    pub(crate) fn finish(&self, wanted: u64, silence: Duration) -> Result<ChannelPages, ChannelsError> {
        let mut state = self.lock();
        let mut packets = self.packets.load(Ordering::Relaxed);
        let mut since = Instant::now();
        while let Some((number, syncs)) = state.lacking(wanted)? {
            let left = silence.saturating_sub(since.elapsed());
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            let now = self.packets.load(Ordering::Relaxed);
            if now != packets {
                (packets, since) = (now, Instant::now());
            } else if since.elapsed() >= silence && state.lacking(wanted)?.is_some() {
                let seconds = silence.as_secs();
                return Err(ChannelsError::Silent { number, syncs, wanted, seconds });
            }
        }
        if let Some((number, syncs)) = state.first(|channel| channel.syncs > wanted) {
            return Err(ChannelsError::TooManySyncs { number, syncs, wanted });
        }
        self.finished.store(true, Ordering::SeqCst);
        Ok(std::mem::take(&mut state.pages))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// A channel with fewer SYNC packets, and how many it has had. Fails if they cannot come any more.
    fn lacking(&self, wanted: u64) -> Result<Option<(usize, u64)>, ChannelsError> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone().into());
        }
        let lacks = |channel: &Channel| !channel.connected || channel.syncs < wanted;
        if let Some((number, syncs)) = self.first(|channel| channel.ended && lacks(channel)) {
            return Err(ChannelsError::Ended { number, syncs, wanted });
        }
        Ok(self.first(lacks))
    }

    fn first(&self, is: impl Fn(&Channel) -> bool) -> Option<(usize, u64)> {
        let mut channels = self.channels.iter().enumerate();
        channels.find(|(_, channel)| is(channel)).map(|(number, channel)| (number, channel.syncs))
    }
}
