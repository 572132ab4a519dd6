//! The events of QEMU, for each thread that waits for some.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use serde_json::Value;

/// How many notices a subscriber may leave unread; then the oldest go.
const UNREAD_MAX: usize = 256;

/// An event in QEMU.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name, such as `MIGRATION` or `STOP`.
    pub name: String,
    /// What it says, or null.
    pub data: Value,
}

/// What a subscriber hears.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// An event.
    Event(Event),
    /// Events may be missing, because the connection broke or too many were unread: ask QEMU for its state.
    Gap,
}

/// The events since a subscription, over all connections of a client.
#[derive(Debug)]
pub struct Events {
    queue: Arc<Queue>,
}

impl Events {
    /// Waits for the next event until the deadline.
    #[must_use]
    pub fn next(&self, deadline: Instant) -> Option<Notice> {
        let mut unread = self.queue.lock();
        loop {
            if let Some(notice) = unread.pop_front() {
                return Some(notice);
            }
            let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
            let waited = self.queue.changed.wait_timeout(unread, left);
            unread = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[derive(Debug, Default)]
struct Queue {
    unread: Mutex<VecDeque<Notice>>,
    changed: Condvar,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Notice>> {
        self.unread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, notice: Notice) {
        let mut unread = self.lock();
        if unread.len() == UNREAD_MAX {
            // The gap takes the place of two notices.
            unread.drain(..2);
            unread.push_front(Notice::Gap);
        }
        unread.push_back(notice);
        self.changed.notify_all();
    }
}

/// Passes each event to all subscribers.
#[derive(Debug, Default)]
pub(super) struct Hub {
    queues: Mutex<Vec<Weak<Queue>>>,
}

impl Hub {
    pub(super) fn subscribe(&self) -> Events {
        let queue = Arc::new(Queue::default());
        self.lock().push(Arc::downgrade(&queue));
        Events { queue }
    }

    pub(super) fn publish(&self, notice: &Notice) {
        self.lock().retain(|queue| match queue.upgrade() {
            Some(queue) => {
                queue.push(notice.clone());
                true
            }
            None => false,
        });
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Queue>>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(number: usize) -> Notice {
        Notice::Event(Event { name: number.to_string(), data: Value::Null })
    }

    #[test]
    fn each_subscriber_hears_each_event_once_in_order() {
        let hub = Hub::default();
        let [first, second] = [hub.subscribe(), hub.subscribe()];
        (0..3).for_each(|number| hub.publish(&event(number)));
        for events in [first, second] {
            let past = Instant::now();
            assert_eq!([0, 1, 2].map(|_| events.next(past)), [0, 1, 2].map(|number| Some(event(number))));
            assert_eq!(events.next(past), None);
        }
    }

    #[test]
    fn what_is_left_unread_is_bounded_and_the_gap_is_announced() {
        let hub = Hub::default();
        let events = hub.subscribe();
        (0..UNREAD_MAX + 100).for_each(|number| hub.publish(&event(number)));
        assert_eq!(events.queue.lock().len(), UNREAD_MAX);
        assert_eq!(events.next(Instant::now()), Some(Notice::Gap));
        assert_eq!(events.next(Instant::now()), Some(event(101)));
    }

    #[test]
    fn a_subscription_that_was_dropped_is_forgotten() {
        let hub = Hub::default();
        drop(hub.subscribe());
        hub.publish(&event(0));
        assert_eq!(hub.lock().len(), 0);
    }
}
