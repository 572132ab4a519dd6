//! Looks inside a round that takes long.

use std::time::Duration;

use super::{Convergence, SHRINK_MAX, THROTTLE_AIM, THROTTLE_STEP_PERCENT};
use crate::convergence::diverging::{Diverging, Help, Why};
use crate::convergence::limits::Policy;
use crate::convergence::next::Decision;
use crate::convergence::round::rate;

/// A round that is being sent, so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inside {
    /// Time since it began.
    pub lasted: Duration,
    /// Bytes of pages sent.
    pub sent_bytes: u64,
    /// Bytes of pages that the guest has written and that are not sent since.
    pub written_bytes: u64,
    /// How long it will go on, at the speed so far.
    pub left: Duration,
}

/// The end of a round that is over sooner shows more.
const LEFT_MIN: Duration = Duration::from_secs(5);

impl Convergence<'_> {
    /// Why the migration will not converge, if two looks inside a round that goes on for long show that: the
    /// guest writes new pages faster than pages are sent, and has written more already than fits the
    /// downtime.
    #[must_use]
    pub fn diverging_inside(&self, before: &Inside, now: &Inside) -> Option<Diverging> {
        let sent = rate(now.sent_bytes, now.lasted)?;
        let written = written(before, now)?;
        let allowed_bytes = sent * self.allowed().as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a comparison")]
        let left_bytes = now.written_bytes as f64;
        if written <= SHRINK_MAX * sent || left_bytes <= allowed_bytes || now.left < LEFT_MIN {
            return None;
        }
        let percent = needed_percent(sent, written).ceil().clamp(1.0, 99.0);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to 99")]
        let throttle_percent = Some(percent as u8).filter(|_| self.history.throttle_percent() == 0);
        Some(Diverging {
            why: Why::GuestTooFast,
            dirty_rate: written,
            is_saturated: false,
            bandwidth: Some(sent),
            is_named: false,
            predicted: Duration::try_from_secs_f64(left_bytes / sent).ok(),
            fixed: self.fixed(),
            tried: None,
            help: Help {
                downtime: None,
                bandwidth: Some(written / THROTTLE_AIM),
                limited: self.is_limited(sent),
                throttle_percent,
                lost: None,
            },
        })
    }

    /// What to do before the round ends with a guest that [is too fast](Self::diverging_inside): what a chain
    /// of policies begins with. What the guest does may pass, and the end of the round shows more, so the
    /// courses are not weighed before.
    #[must_use]
    pub fn decide_inside(&self, before: &Inside, now: &Inside) -> Decision {
        let rates = rate(now.sent_bytes, now.lasted).zip(written(before, now));
        let Some((sent, written)) = rates else { return Decision::AnotherRound };
        let (percent, most) = (self.history.throttle_percent(), self.limits.throttle_max_percent);
        for policy in self.limits.if_stuck.policies() {
            match policy {
                Policy::Throttle if percent >= most || self.history.throttle_refused => {}
                Policy::Throttle => {
                    let at_full_speed = written * 100.0 / f64::from(100 - percent.min(99));
                    let step = (needed_percent(sent, at_full_speed) - f64::from(percent)) / 2.0;
                    let step = step.clamp(*THROTTLE_STEP_PERCENT.start(), *THROTTLE_STEP_PERCENT.end());
                    #[expect(
                        clippy::cast_possible_truncation,
                        clippy::cast_sign_loss,
                        reason = "at most 20"
                    )]
                    return Decision::Throttle(percent.saturating_add(step.round() as u8).min(most));
                }
                Policy::Abort => return Decision::GiveUp,
                Policy::Auto | Policy::Relax | Policy::Stop => return Decision::AnotherRound,
            }
        }
        Decision::AnotherRound
    }
}

/// Bytes a second of new pages that the guest wrote between two looks; no more than since the round began.
fn written(before: &Inside, now: &Inside) -> Option<f64> {
    let between = rate(
        now.written_bytes.saturating_sub(before.written_bytes),
        now.lasted.saturating_sub(before.lasted),
    )?;
    Some(between.min(rate(now.written_bytes, now.lasted)?))
}

/// By how many percent a guest has to be slowed that writes faster than pages are sent.
fn needed_percent(sent: f64, written: f64) -> f64 {
    100.0 * (1.0 - THROTTLE_AIM * sent / written)
}
