//! Panics as errors: a defect, even in the VMM or in an observer, must not leave the rest of a migration
//! waiting for it.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The message of a panic.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Panicked(pub(crate) String);

/// Does `work`. After a panic the caller must not use anything that `work` may have left half changed.
pub(crate) fn caught<T>(work: impl FnOnce() -> T) -> Result<T, Panicked> {
    catch_unwind(AssertUnwindSafe(work)).map_err(Panicked::from)
}

/// Does work that may also fail.
pub(crate) fn caught_or<T, E: From<Panicked>>(work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    caught(work).unwrap_or_else(|panic| Err(panic.into()))
}

impl From<Box<dyn Any + Send>> for Panicked {
    fn from(panic: Box<dyn Any + Send>) -> Self {
        let text = panic.downcast_ref::<&str>().map(|&text| text.to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        Self(text.unwrap_or_else(|| "a panic without a text".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_panic_says_is_kept() {
        let panicked = |text: &str| Err(Panicked(text.into()));
        assert_eq!(caught::<()>(|| panic!("plain")), panicked("plain"));
        assert_eq!(caught::<()>(|| panic!("{}", 1)), panicked("1"));
        assert_eq!(caught::<()>(|| std::panic::panic_any(1)), panicked("a panic without a text"));
        assert_eq!(caught(|| 1), Ok(1));
        assert_eq!(caught_or::<(), Panicked>(|| panic!("plain")), panicked("plain"));
    }
}
