//! The built-in guest: its place in RAM, the pattern that it writes, and its code.
//!
//! The guest sweeps over a working set. In pass *g* it writes generation *g* of a [`pattern`] into every
//! page, eight words a page. The progress of each vCPU is in its [`control`] page, so at any instant every
//! word of the working set has exactly one right value: the guest can check itself, and a VMM that paused it
//! can check it too. With each beat of vCPU 0 the VMM writes into the [`beat_page`]: guest RAM that only the
//! VMM dirties.

pub(crate) mod beat_page;
pub(crate) mod control;
pub(crate) mod layout;
pub(crate) mod pattern;
pub(crate) mod payload;
