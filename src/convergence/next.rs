use std::time::Duration;

/// What to do after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send the dirty pages in another round.
    AnotherRound,
    /// Watch for so long what the guest writes, and decide again: rounds do not show how fast it writes.
    Look(Duration),
    /// Slow the guest to this many percent, then send another round; 0 takes the throttle back.
    Throttle(u8),
    /// Allow this much downtime; if the switch fits it now, switch.
    Relax(Duration),
    /// Pause the guest and switch: the downtime limit is met.
    Switch,
    /// Pause the guest and switch, whatever the downtime.
    Stop,
    /// Give up; the guest runs on.
    GiveUp,
}
