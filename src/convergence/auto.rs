use std::time::Duration;

use super::course::Offer;
use super::courses;
use super::history::History;
use super::next::Decision;
use super::outlook::{Bounds, Outlook};

/// What all courses offer.
pub(super) fn offers(ahead: &Outlook) -> Vec<Offer> {
    courses::ALL.iter().map(|course| course.offer(ahead)).collect()
}

/// The course that costs the guest least within the limits, for a migration whose rounds do not come down to
/// the downtime limit, or only with the guest slowed.
pub(super) fn choose(ahead: &Outlook, history: &History) -> Decision {
    let offers = offers(ahead);
    let open = offers.iter().filter_map(|offer| Some((offer, offer.open()?)));
    let Some((best, end)) = open.min_by(|(_, one), (_, other)| one.weight().total_cmp(&other.weight()))
    else {
        return Decision::GiveUp;
    };
    let is_futile = history.futile_throttle().is_some();
    let going_on = offers.iter().find(|offer| offer.step == Decision::AnotherRound && offer.open().is_some());
    match (best.step, going_on.and_then(Offer::open)) {
        (Decision::AnotherRound, _) if is_futile => Decision::Throttle(0),
        // A change has to be worth it, because predictions vary from round to round.
        (Decision::Throttle(_), Some(as_now)) if !is_futile && end.weight() > WORTH_IT * as_now.weight() => {
            Decision::AnotherRound
        }
        (step, _) => step,
    }
}

/// A throttle that is likely to help, if any is, halfway or more from what was tried in vain to all of the
/// guest's time. The rounds after it show whether it does, and a few trials suffice.
pub(super) fn experiment(ahead: &Outlook, history: &History) -> Decision {
    let futile_percent = u8::midpoint(ahead.bounds.futile_percent, 99);
    let bounds = Bounds { futile_percent, ..ahead.bounds };
    match choose(&Outlook { bounds, ..ahead.clone() }, history) {
        throttle @ Decision::Throttle(1..) => throttle,
        _ => Decision::GiveUp,
    }
}

/// What a course has to cost at most, as a share of what going on costs, to be taken instead.
const WORTH_IT: f64 = 0.8;

/// Whether a migration that may switch now costs the guest less if it does so later.
pub(super) fn waits(ahead: &Outlook, history: &History) -> bool {
    let gets_smaller = history.shrink().is_some_and(|shrink| shrink < SHRINKING);
    let Some(now) = ahead.ends(ahead.throttle_percent).first().copied() else { return false };
    let later = ahead.best(ahead.throttle_percent, 1, ahead.bounds.downtime);
    gets_smaller && later.is_some_and(|later| later.weight() + GAIN_MIN < SHRINKING * now.weight())
}

/// Rounds get smaller if they leave at most this share.
const SHRINKING: f64 = 0.9;

/// The least gain for which a switch waits, in seconds: rounds are predicted no better.
const GAIN_MIN: f64 = 0.002;

/// For how long the rounds of a guest at full speed are watched before anything is done that costs the guest
/// more than the limits of the downtime, or the migration is given up: what it does may pass, and waiting
/// costs it hardly anything. As long as the first round took, within these bounds.
pub(super) fn patience(history: &History) -> Duration {
    let first = history.rounds().first().map_or(Duration::ZERO, |round| round.duration);
    first.clamp(Duration::from_millis(500), Duration::from_secs(5))
}

/// How long to watch the guest before a decision, if that shows more than the rounds have shown.
pub(super) fn next_look(history: &History) -> Option<Duration> {
    let (last, looks) = (history.rounds().last()?, history.looks_since_round()?);
    // A throttle lets the guest run and stand still in turn.
    if history.throttle_percent() > 0 || looks.len() >= LOOKS_MAX {
        return None;
    }
    let Some(look) = looks.last() else {
        let since = history.looks().last().map_or(0, |look| look.after_rounds + LOOK_AGAIN_AFTER);
        let time = ((last.duration + last.harvest) / 16).min(LOOK_MAX);
        return (time >= LOOK_MIN && history.rounds().len() >= since).then_some(time);
    };
    // The whole hot set again: a shorter look may show how fast that is written.
    #[expect(clippy::cast_precision_loss, reason = "a comparison")]
    let is_saturated = look.sample.dirty_bytes as f64 > 0.8 * last.dirty_bytes() as f64;
    Some(look.sample.interval / 8).filter(|&time| is_saturated && time >= LOOK_MIN)
}

/// A look is a short time against a round, and long enough to be measured.
const LOOK_MAX: Duration = Duration::from_millis(50);
const LOOK_MIN: Duration = Duration::from_millis(1);
const LOOKS_MAX: usize = 3;
/// A look counts for so many rounds.
const LOOK_AGAIN_AFTER: usize = 3;
