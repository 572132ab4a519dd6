//! What the process of a guest needs of it, whichever VMM runs the guest.

use std::fmt::Debug;
use std::path::Path;
use std::time::Duration;

use sterna::convergence::SwitchCost;
use sterna::guest::SourceGuest;
use sterna::sampling::SamplingError;

use super::ended::Ended;
use super::protocol::{Checked, Samples, Vitals};
use super::server::Server;

/// A guest that a process of this host holds.
pub(crate) trait HeldGuest: SourceGuest + Debug {
    /// Its control socket, which reserves the name.
    fn socket(&self) -> &Server;

    /// What its VMM reports.
    fn vitals(&self) -> Vitals;

    /// Whether its vCPUs run.
    fn is_running(&self) -> bool;

    /// The monitor of its VMM, if that is a process of its own, which outlives this one.
    fn monitor_socket(&self) -> Option<&Path>;

    /// Whether its VMM has ended, and the guest with it.
    fn has_ended(&self) -> bool;

    /// The cost of its switch, as far as it is known.
    fn switch_cost(&self) -> SwitchCost;

    /// Measures how fast the guest writes, for `longest` and for shorter intervals before.
    fn sample(&self, longest: Duration) -> Result<Samples, SamplingError>;

    /// Lets the guest check its own memory; an error if it has no means to.
    fn check(&self) -> Result<Checked, String>;

    /// This process holds the guest from now on, which came from another host and has started.
    fn arrived(&self);

    /// The guest belongs to another host: its VMM ends here.
    fn moved(&self);

    /// The operator wants this process to end. Answers what became of the guest.
    fn released(&self) -> Ended;

    /// What happens to the guest when this process ends before it moved, as a clause without a subject.
    fn without_process(&self) -> &'static str;
}
