//! Registration that can fail, for memory that needs none.

use std::sync::{Arc, Condvar, Mutex};

use super::faults::LaneFaults;
use crate::control::{ControlChannel, STEP_MAX};
use crate::dirty::DirtyBitmap;
use crate::memory::RamLayout;
use crate::poison::IgnorePoison;
use crate::transport::error::TransportError;
use crate::transport::lane::Registration;
use crate::transport::rdma::wire::{ChunkRange, Keys, Request};
use crate::transport::requests::{await_answer, send_request};

/// Registers guest RAM at both ends, each region as one chunk, before the lanes of a round write a page.
#[derive(Debug)]
pub(super) struct FaultyRegistration {
    chunks: Vec<ChunkRange>,
    faults: Arc<LaneFaults>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Coming,
    Here,
    /// It failed, or is not needed any more.
    Over,
}

impl FaultyRegistration {
    pub(super) fn new(layout: RamLayout, faults: Arc<LaneFaults>) -> Self {
        let chunk = |(region, pages)| ChunkRange { region, first_page: 0, pages };
        let pages = layout.regions.into_iter().map(|region| region.pages());
        let chunks = (0..).zip(pages).map(chunk).collect();
        Self { chunks, faults, state: Mutex::new(State::Coming), changed: Condvar::new() }
    }

    pub(super) fn begin(&self) {
        self.set(State::Coming);
    }

    /// Waits until pages may be written.
    pub(super) fn wait(&self) -> Result<(), TransportError> {
        let state = self.state.lock().ignore_poison();
        let waiting = self.changed.wait_while(state, |state| *state == State::Coming);
        match *waiting.ignore_poison() {
            State::Here => Ok(()),
            _ => Err(TransportError::NotRegistered { why: "its registration failed" }),
        }
    }

    fn set(&self, state: State) {
        *self.state.lock().ignore_poison() = state;
        self.changed.notify_all();
    }

    fn register(&self, control: &mut ControlChannel) -> Result<(), TransportError> {
        send_request(Request::Register(self.chunks.clone()).encode()?, control)?;
        // As the registrar does, with the answer in flight.
        self.faults.registration.strike()?;
        Keys::decode(&await_answer("keys", STEP_MAX, control)?).map(drop)
    }
}

impl Registration for FaultyRegistration {
    fn run(&self, _dirty: &DirtyBitmap, control: &mut ControlChannel) -> Result<(), TransportError> {
        let registered = self.register(control);
        self.set(if registered.is_ok() { State::Here } else { State::Over });
        registered
    }

    fn end(&self) {
        let mut state = self.state.lock().ignore_poison();
        if *state == State::Coming {
            *state = State::Over;
        }
        drop(state);
        self.changed.notify_all();
    }
}
