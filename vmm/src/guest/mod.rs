//! The built-in guest: where it lies in RAM, what it writes there, and the code that does it.
//!
//! The guest sweeps over a working set. In pass *g* it writes generation *g* of a [`pattern`] into every page, eight
//! words a page. How far each vCPU is stands in its [`control`] page, so that at any instant every word of the
//! working set has exactly one value that is right: the guest can check itself, and so can a VMM that paused it.
//! With each beat of vCPU 0 the VMM writes into the [`beat_page`]: guest RAM that only the VMM dirties.

pub(crate) mod beat_page;
pub(crate) mod control;
pub(crate) mod layout;
pub(crate) mod pattern;
pub(crate) mod payload;
