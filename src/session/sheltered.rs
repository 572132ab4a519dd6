//! An observer that cannot end what it observes.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::panics::{Panicked, caught};
use crate::progress::{Event, Observer};

/// Passes events on until the observer panics, and then no more.
pub(crate) struct Sheltered<'observer> {
    observer: &'observer dyn Observer,
    panicked: AtomicBool,
}

impl<'observer> Sheltered<'observer> {
    pub(crate) fn new(observer: &'observer dyn Observer) -> Self {
        Self { observer, panicked: AtomicBool::new(false) }
    }
}

impl Observer for Sheltered<'_> {
    fn event(&self, event: &Event) {
        if self.panicked.load(Ordering::Relaxed) {
            return;
        }
        if let Err(Panicked(text)) = caught(|| self.observer.event(event)) {
            self.panicked.store(true, Ordering::Relaxed);
            tracing::error!("the observer of a migration panicked, and gets no more events: {text}");
        }
    }
}
