//! Why a table has no figures.

/// Any error: it is only printed.
pub(super) type Failure = Box<dyn std::error::Error>;
