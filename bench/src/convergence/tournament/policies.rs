//! What is done after each round, by those that are compared.

use std::time::Duration;

use sterna::convergence::{Convergence, Decision};

use super::world::{Outcome, World};

/// A policy: plays a migration to its end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Policy {
    pub(super) name: &'static str,
    pub(super) play: fn(&mut World<'_>) -> Outcome,
}

pub(super) const POLICIES: [Policy; 6] = [
    Policy { name: "auto", play: sterna },
    Policy { name: "steps of throttle", play: steps },
    Policy { name: "QEMU auto-converge", play: auto_converge },
    Policy { name: "QEMU dirty limit", play: dirty_limit },
    Policy { name: "rising downtime", play: rising },
    Policy { name: "stop at once", play: stop },
];

/// As the engine does.
fn sterna(world: &mut World<'_>) -> Outcome {
    loop {
        world.round();
        let judged = convergence(world, None).diverging().map(|diverging| diverging.why);
        world.history.judged(judged);
        let decision = loop {
            match convergence(world, None).decide() {
                Decision::Look(time) => {
                    let sample = world.look(time);
                    world.history.looked(sample);
                }
                other => break other,
            }
        };
        match decision {
            Decision::AnotherRound | Decision::Look(_) => {}
            Decision::Throttle(percent) => {
                let expected_bytes = convergence(world, None).expected_bytes(percent);
                world.history.throttled(percent, expected_bytes);
                world.throttle_percent = percent;
            }
            Decision::Relax(downtime) => {
                world.history.relaxed_to(downtime);
                if convergence(world, None).fits() {
                    return world.switch();
                }
            }
            Decision::Switch | Decision::Stop => return world.switch(),
            Decision::GiveUp => return world.give_up(),
        }
    }
}

fn convergence<'world>(world: &'world World<'_>, elapsed: Option<Duration>) -> Convergence<'world> {
    Convergence {
        limits: world.limits,
        history: &world.history,
        predicted: world.predicted(),
        elapsed: elapsed.unwrap_or_else(|| world.elapsed()),
    }
}

fn fits(world: &World<'_>, downtime: Duration) -> bool {
    world.predicted().total().mul_f64(1.15) <= downtime
}

/// Whether rounds are over.
fn over(world: &World<'_>) -> bool {
    world.history.rounds().len() >= world.limits.rounds_max as usize
}

/// The default of earlier versions: slows the guest in steps of 10 to 20 points towards 0.7 of the link once
/// rounds leave more than 97 % twice, up to 99 %, until rounds are over.
fn steps(world: &mut World<'_>) -> Outcome {
    let mut stuck = 0;
    loop {
        world.round();
        let rounds = world.history.rounds().len();
        if rounds > 1 && fits(world, world.limits.downtime) {
            return world.switch();
        }
        if over(world) {
            return world.give_up();
        }
        stuck = if world.history.shrink().is_some_and(|shrink| shrink > 0.97) { stuck + 1 } else { 0 };
        let needed = if world.throttle_percent > 0 { 1 } else { 2 };
        if stuck >= needed && world.throttle_percent < 99 {
            let rate = world.history.dirty_rate_unthrottled().max(1.0);
            let wanted = 100.0 * (1.0 - 0.7 * world.bandwidth / rate);
            let step = ((wanted - f64::from(world.throttle_percent)) / 2.0).clamp(10.0, 20.0);
            slow(world, world.throttle_percent.saturating_add(step as u8).min(99));
            stuck = 0;
        }
    }
}

fn slow(world: &mut World<'_>, percent: u8) {
    world.throttle_percent = percent;
    world.history.throttled(percent, f64::INFINITY);
}

/// Documented: once a round's new pages exceed half of what was sent, twice, 20 %, then 10 points more each
/// time, up to 99 %.
fn auto_converge(world: &mut World<'_>) -> Outcome {
    let mut high = 0;
    loop {
        let sent_before = world.sent;
        world.round();
        if fits(world, world.limits.downtime) {
            return world.switch();
        }
        if over(world) {
            return world.give_up();
        }
        if world.dirty_bytes() > 0.5 * (world.sent - sent_before) {
            high += 1;
        }
        if high >= 2 {
            high = 0;
            let next = if world.throttle_percent == 0 { 20 } else { world.throttle_percent + 10 };
            slow(world, next.min(99));
        }
    }
}

/// Documented: by the same trigger, each vCPU that writes is held to 1 MB a second of new pages.
fn dirty_limit(world: &mut World<'_>) -> Outcome {
    let mut high = 0;
    world.spares_readers = true;
    loop {
        let sent_before = world.sent;
        world.round();
        if fits(world, world.limits.downtime) {
            return world.switch();
        }
        if over(world) {
            return world.give_up();
        }
        if world.dirty_bytes() > 0.5 * (world.sent - sent_before) {
            high += 1;
        }
        if high >= 2 && world.throttle_percent == 0 {
            let rate: f64 = world.guest.parts.iter().map(|part| part.rate).sum();
            let percent = (100.0 * (1.0 - 1e6 / rate)).clamp(1.0, 99.0);
            slow(world, percent as u8);
        }
    }
}

/// Allows half of the limit more for each round that does not get smaller, up to the most that is allowed.
fn rising(world: &mut World<'_>) -> Outcome {
    let (mut allowed, most) = (world.limits.downtime, world.limits.downtime_relaxed_max());
    loop {
        world.round();
        if world.history.rounds().len() > 1 && fits(world, allowed) {
            return world.switch();
        }
        if over(world) {
            return world.give_up();
        }
        if world.history.shrink().is_some_and(|shrink| shrink > 0.97) {
            allowed = (allowed + world.limits.downtime / 2).min(most);
        }
    }
}

/// Two rounds, then the switch whatever it takes.
fn stop(world: &mut World<'_>) -> Outcome {
    world.round();
    world.round();
    world.switch()
}

/// The least that the guest can lose within the limits: tries all throttles from each of the first rounds on,
/// and a switch after each round.
pub(super) fn clairvoyant(world: &World<'_>) -> Option<Outcome> {
    let mut best: Option<Outcome> = None;
    let mut full_speed = world.clone();
    for unslowed in 1..=world.limits.rounds_max {
        full_speed.round();
        try_switch(&full_speed, &mut best);
        if unslowed > UNSLOWED_MAX {
            continue;
        }
        for percent in (5..=95).step_by(5).chain(96..=99) {
            let mut world = full_speed.clone();
            world.throttle_percent = percent;
            for _ in unslowed..world.limits.rounds_max {
                world.round();
                try_switch(&world, &mut best);
                if best.is_some_and(|best| world.give_up().lost > best.lost) {
                    break;
                }
            }
        }
    }
    best
}

/// A guest that is slowed later than that loses no less.
const UNSLOWED_MAX: u32 = 8;

/// With the sure knowledge of what a switch takes.
fn try_switch(world: &World<'_>, best: &mut Option<Outcome>) {
    if world.predicted().total() <= world.limits.downtime_relaxed_max() {
        let outcome = world.clone().switch();
        if best.is_none_or(|best| outcome.lost < best.lost) {
            *best = Some(outcome);
        }
    }
}
