use std::time::Duration;

use super::lost::Lost;
use super::prediction::SAFETY;
use super::write_shares::WriteShares;
use super::writes::Writes;

/// What is ahead of a migration: rounds as they would go on, and where the limits are.
///
/// Times are in seconds.
#[derive(Clone, Debug)]
pub struct Outlook {
    /// What the guest writes.
    pub writes: Writes,
    /// Bytes a second that the link carries.
    pub bandwidth: f64,
    /// Bytes that are dirty now.
    pub dirty_bytes: f64,
    /// The part that waits for the last round, as long as the guest is not slowed otherwise.
    pub waiting_bytes: f64,
    /// Seconds in which the rest was written.
    pub written_in: f64,
    /// The downtime of a switch now.
    pub downtime: f64,
    /// The downtime of a switch with nothing left to send.
    pub fixed: f64,
    /// Seconds that sending waits until a VMM that names pages has named a byte more.
    pub naming: f64,
    /// What a round takes besides.
    pub overhead: f64,
    /// The share of the guest's time that recording its writes takes.
    pub tracking_share: f64,
    /// How far the guest is slowed now.
    pub throttle_percent: u8,
    /// How the guest's writes are spread over its vCPUs, if each can be limited by itself: then slowing the
    /// guest is to limit what it writes.
    pub write_shares: Option<WriteShares>,
    /// Whether several rounds at full speed did not get smaller, whatever is predicted of the next ones.
    pub is_stuck: bool,
    /// The limits.
    pub bounds: Bounds,
}

/// What the limits leave to a migration.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The downtime limit.
    pub downtime: f64,
    /// The most downtime that may ever be allowed.
    pub downtime_max: f64,
    /// How far the guest may be slowed.
    pub throttle_max_percent: u8,
    /// Throttling by so many percent had no effect.
    pub futile_percent: u8,
    /// Rounds until the last one allowed.
    pub rounds: u32,
    /// Seconds until the time limit.
    pub seconds: f64,
    /// Seconds of the guest's time that may still be lost.
    pub lost: f64,
}

/// A switch after some more rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct End {
    /// How many rounds.
    pub rounds: u32,
    /// When the switch begins.
    pub until_switch: Duration,
    /// What the guest loses from now on.
    pub lost: Lost,
    /// Bytes sent from now on.
    pub sent_bytes: f64,
}

/// What a second of migration weighs against a second that the guest loses: between two ways that cost the
/// guest the same, the quicker.
const SECOND_WEIGHS: f64 = 0.000_5;

/// Rounds that are played through: after so many nothing changes any more.
const ROUNDS_PLAYED: u32 = 100;

impl End {
    /// By which ends are compared: seconds that the guest loses, and a little for the time.
    #[must_use]
    pub fn weight(&self) -> f64 {
        self.lost.total().as_secs_f64() + SECOND_WEIGHS * self.until_switch.as_secs_f64()
    }

    /// The downtime to allow for this end.
    #[must_use]
    pub fn needed(&self) -> f64 {
        self.lost.downtime.as_secs_f64() * SAFETY
    }
}

impl Outlook {
    /// Whether this end is within the limits other than that of the downtime.
    #[must_use]
    pub fn allows(&self, end: &End) -> bool {
        end.rounds <= self.bounds.rounds
            && end.until_switch.as_secs_f64() <= self.bounds.seconds
            && end.lost.total().as_secs_f64() <= self.bounds.lost
    }

    /// The switch after each number of rounds from none on, with the guest slowed by so many percent.
    #[must_use]
    pub fn ends(&self, throttle_percent: u8) -> Vec<End> {
        let running = running(throttle_percent);
        let throttled = self.throttled_share(throttle_percent);
        let (mut dirty_bytes, mut seconds, mut sent_bytes) = (self.dirty_bytes, 0.0, 0.0);
        let waiting = if throttle_percent == self.throttle_percent { self.waiting_bytes } else { 0.0 };
        // The hot pages wait, so what is written besides grows with time.
        let besides = (self.dirty_bytes - waiting) / self.written_in.max(1e-6);
        let mut ends = Vec::new();
        for rounds in 0..=ROUNDS_PLAYED.min(self.bounds.rounds) {
            let more = (dirty_bytes - self.dirty_bytes) * (1.0 / self.bandwidth + self.naming);
            let until_switch = time(seconds);
            let lost = Lost {
                downtime: time((self.downtime + more).max(self.fixed)),
                throttling: until_switch.mul_f64(throttled),
                tracking: time(seconds * (1.0 - throttled) * self.tracking_share),
            };
            ends.push(End { rounds, until_switch, lost, sent_bytes: sent_bytes + dirty_bytes });
            let sending = (dirty_bytes - waiting) / self.bandwidth;
            let round = sending + dirty_bytes * self.naming + self.overhead;
            seconds += round;
            sent_bytes += dirty_bytes - waiting;
            let written = self.writes.bytes_in(round * running);
            dirty_bytes = match waiting > 0.0 {
                true => written.max(waiting + written.min(besides * round)),
                false => written,
            };
        }
        ends
    }

    /// The end that costs the guest least, slowed by so many percent, after `rounds_min` rounds at least, if
    /// its downtime is at most `downtime` and the other limits allow it.
    #[must_use]
    pub fn best(&self, throttle_percent: u8, rounds_min: u32, downtime: f64) -> Option<End> {
        // Predictions of a guest as it is have not come true.
        let is_known =
            |end: &End| end.rounds == 0 || !self.is_stuck || throttle_percent != self.throttle_percent;
        let open = |end: &End| {
            is_known(end) && end.rounds >= rounds_min && end.needed() <= downtime && self.allows(end)
        };
        let ends = self.ends(throttle_percent).into_iter().filter(open);
        ends.min_by(|one, other| one.weight().total_cmp(&other.weight()))
    }

    /// What a round would leave dirty at the most with the guest slowed by so many percent, once it has been
    /// slowed for a round. Of a hot set of unknown speed, what is likely.
    #[must_use]
    pub fn expected_bytes(&self, throttle_percent: u8) -> f64 {
        let seconds = self.round() * running(throttle_percent);
        match self.writes.is_saturated() {
            true => self.writes.bytes_in(seconds),
            false => self.writes.cautious().bytes_in(seconds),
        }
    }

    /// The bytes a second to which the guest's writes are to be limited in the next round, so that it leaves
    /// what it would with the guest slowed by so many percent.
    #[must_use]
    pub fn write_limit(&self, throttle_percent: u8) -> f64 {
        let waiting = if throttle_percent == self.throttle_percent { self.waiting_bytes } else { 0.0 };
        let round = (self.round() - waiting / self.bandwidth).max(1e-3);
        self.writes.bytes_in(round * running(throttle_percent)) / round
    }

    /// The share of its time that the guest loses if it is slowed by so many percent.
    fn throttled_share(&self, throttle_percent: u8) -> f64 {
        let running = running(throttle_percent);
        self.write_shares.as_ref().map_or(1.0 - running, |shares| shares.lost(running))
    }

    /// How long the next round takes.
    fn round(&self) -> f64 {
        self.dirty_bytes * (1.0 / self.bandwidth + self.naming) + self.overhead
    }

    /// The same on a link of another bandwidth.
    #[must_use]
    pub fn over(&self, bandwidth: f64) -> Self {
        let sending = self.dirty_bytes / self.bandwidth;
        let downtime = (self.downtime - sending).max(self.fixed) + self.dirty_bytes / bandwidth;
        Self { bandwidth, downtime, ..self.clone() }
    }

    /// The percentages by which the guest may be slowed and has not been in vain.
    pub fn throttles(&self) -> impl DoubleEndedIterator<Item = u8> + use<> {
        let Bounds { throttle_max_percent, futile_percent, .. } = self.bounds;
        (1..=99).filter(move |&percent| {
            (percent % 5 == 0 || percent > 95 || percent == throttle_max_percent)
                && percent <= throttle_max_percent
                && percent > futile_percent
        })
    }
}

/// The share of its time in which a slowed guest writes.
fn running(throttle_percent: u8) -> f64 {
    f64::from(100 - throttle_percent.min(99)) / 100.0
}

/// A year at most: no operator waits longer.
fn time(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.clamp(0.0, 365.0 * 24.0 * 3600.0))
}
