//! Locks after a panic: the library and the command each compile this file.

use std::sync::LockResult;

/// Takes a lock although a thread has panicked while it held the lock. The panic is reported where it was
/// caught; a second one in every other thread would keep a migration from ending in order.
pub(crate) trait IgnorePoison<T> {
    /// The guard or the value.
    fn ignore_poison(self) -> T;
}

impl<T> IgnorePoison<T> for LockResult<T> {
    fn ignore_poison(self) -> T {
        self.unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
