//! Guests by what they write.

use super::random::Random;

/// A guest.
#[derive(Clone, Debug)]
pub(super) struct Guest {
    /// What it ever touched, in bytes.
    pub(super) touched: f64,
    /// What it writes.
    pub(super) parts: Vec<Part>,
    /// The share of its time that recording its writes takes.
    pub(super) tracking_share: f64,
    /// Whether its heartbeat shows that.
    pub(super) beats: bool,
    /// The share of its vCPUs that write.
    pub(super) writers: f64,
}

/// The kinds of guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// All of its memory at the same rate.
    Uniform,
    /// A small part often, the rest seldom.
    HotAndCold,
    /// A few pages very often, many seldom, by Zipf's law.
    Zipf,
    /// Much for a while, then little.
    Bursts,
    /// Young objects over and over, and all of the heap now and then.
    Collector,
    /// Ever more memory.
    Growing,
    /// One vCPU of many, which sweeps over its memory.
    OneWriter,
}

pub(super) const KINDS: [Kind; 7] = [
    Kind::Uniform,
    Kind::HotAndCold,
    Kind::Zipf,
    Kind::Bursts,
    Kind::Collector,
    Kind::Growing,
    Kind::OneWriter,
];

/// A part of its memory that is written alike.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) bytes: f64,
    /// Bytes a second at full speed.
    pub(super) rate: f64,
    /// Page after page, or at random.
    pub(super) sweeps: bool,
    pub(super) bursts: Option<Bursts>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Bursts {
    /// Seconds from one burst to the next.
    pub(super) period: f64,
    /// The share of that for which it writes.
    pub(super) share: f64,
    pub(super) phase: f64,
}

impl Guest {
    /// A guest of this kind for a link that carries so many bytes a second.
    pub(super) fn of(kind: Kind, bandwidth: f64, random: &mut Random) -> Self {
        const GIB: f64 = (1u64 << 30) as f64;
        let touched = random.of_magnitude(GIB, 12.0 * 1024.0 * GIB);
        // From idle to ten times the link.
        let rate = bandwidth * random.of_magnitude(0.01, 10.0);
        // What a link carries in a millisecond to a minute.
        let hot = (bandwidth * random.of_magnitude(0.001, 60.0)).min(touched / 2.0);
        let part = |bytes: f64, rate: f64| Part { bytes, rate, sweeps: false, bursts: None };
        let bursts =
            |period: f64, share: f64, phase: f64| Some(Bursts { period, share, phase: phase * period });
        let parts = match kind {
            Kind::Uniform => vec![part(touched, rate)],
            Kind::HotAndCold => {
                vec![part(hot, rate), part(touched - hot, rate * random.of_magnitude(0.001, 0.2))]
            }
            Kind::Zipf => {
                // A tenth of the pages has about as many writes as the next tenth, in ten classes.
                let class = |index: i32| touched.min(hot * 64.0) * 0.5f64.powi(index) / 2.0;
                (0..12).map(|index| part(class(index), rate / 12.0)).collect()
            }
            Kind::Bursts => {
                let period = random.of_magnitude(1.0, 60.0);
                let (share, phase) = (random.between(0.1, 0.8), random.share());
                let quiet = part(hot * 0.2, rate * random.of_magnitude(0.001, 0.1));
                vec![Part { bursts: bursts(period, share, phase), ..part(hot, rate) }, quiet]
            }
            Kind::Collector => {
                let period = random.of_magnitude(2.0, 120.0);
                let all = Part {
                    sweeps: true,
                    bursts: bursts(period, 0.1, random.share()),
                    ..part(hot * 4.0, rate * 4.0)
                };
                vec![Part { sweeps: true, ..part(hot, rate) }, all]
            }
            Kind::Growing => vec![part(hot, rate), Part { sweeps: true, ..part(touched * 4.0, rate * 0.05) }],
            Kind::OneWriter => vec![Part { sweeps: true, ..part(hot, rate) }],
        };
        let writers = if kind == Kind::OneWriter { random.one_of(&[0.0625, 0.125, 0.25]) } else { 1.0 };
        let tracking_share = random.one_of(&[0.0, 0.002, 0.01, 0.03]);
        Self { touched, parts, tracking_share, beats: random.share() < 0.5, writers }
    }
}

impl Part {
    /// Bytes of different pages written from one time to another, with the guest running for this share.
    pub(super) fn written(&self, from: f64, to: f64, running: f64) -> f64 {
        let work = self.rate * self.active(from, to) * running;
        if self.sweeps { work.min(self.bytes) } else { self.bytes * -(-work / self.bytes).exp_m1() }
    }

    /// The same with `sent` bytes being sent and watched again one after the other meanwhile: what is written
    /// to them before that is sent with them.
    pub(super) fn left(&self, sent: f64, (from, to): (f64, f64), running: f64) -> f64 {
        const STEPS: u32 = 8;
        let sent_share = (sent / self.bytes).min(1.0);
        let since = |step: u32| from + (to - from) * (f64::from(step) + 0.5) / f64::from(STEPS);
        let of_sent =
            (0..STEPS).map(|step| self.written(since(step), to, running)).sum::<f64>() / f64::from(STEPS);
        sent_share * of_sent + (1.0 - sent_share) * self.written(from, to, running)
    }

    /// For how many of these seconds it writes.
    fn active(&self, from: f64, to: f64) -> f64 {
        let Some(Bursts { period, share, phase }) = self.bursts else { return to - from };
        let before = |time: f64| {
            let turns = (time + phase) / period;
            (turns.floor() + turns.fract().min(share) / share) * share * period
        };
        before(to) - before(from)
    }
}
