//! Policies against each other, by simulation: synthetic guests over links of several speeds, and how much of
//! its time each policy takes from the guest, beside the least that is possible for one that knows the guest.
//!
//! The decisions of Sterna are the engine's own ([`Convergence`](sterna::convergence::Convergence)); the
//! other policies are as their documents say. Guests and noise are the same in each run with the same seed.
//!
//! | file | |
//! |---|---|
//! | `guest` | what a guest writes |
//! | `world` | how a migration goes |
//! | `policies` | what is done after each round |
//! | `race` | a guest under all policies |
//! | `plot` | the time lost by policy, as a picture |

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "simulated figures, not below 0"
)]

mod guest;
mod plot;
mod policies;
mod race;
mod random;
mod world;

use std::fs;
use std::path::PathBuf;

use clap::Args;
use sterna::convergence::Limits;

use crate::convergence::error::BenchError;
use guest::{Guest, KINDS};
use policies::{POLICIES, clairvoyant};
use race::Race;
use random::Random;
use world::{Outcome, World};

/// The parameters of a tournament.
#[derive(Clone, Debug, Args)]
pub(super) struct TournamentArgs {
    /// How many guests take part in the tournament
    #[arg(long, default_value_t = 1000)]
    guests: u32,
    /// Another seed is another tournament
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print each guest whose time lost under `auto` is so many times the optimum
    #[arg(long)]
    worse_than: Option<f64>,
    /// Write a plot of the tournament, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

/// Gb/s.
const LINKS: [f64; 6] = [1.0, 10.0, 25.0, 100.0, 200.0, 400.0];

pub(super) fn run(args: &TournamentArgs) -> Result<(), BenchError> {
    let limits = Limits::default();
    let races: Vec<_> = (0..args.guests).map(|number| play_race(number, &limits, args)).collect();
    let solvable: Vec<_> = races.iter().filter(|race| race.optimum.is_some()).collect();
    println!(
        "{} guests, {} of which can move within {:.0} ms of downtime and 99 % of throttle; times as multiples of the optimum's",
        races.len(),
        solvable.len(),
        limits.downtime_relaxed_max().as_secs_f64() * 1e3
    );
    println!(
        "{:<20} {:>7} {:>7} {:>8} {:>8} {:>7} {:>7} {:>6} {:>7} {:>8}",
        "policy",
        "lost50",
        "lost95",
        "lost max",
        "lost sum",
        "total50",
        "bytes50",
        "failed",
        "limit",
        "in vain"
    );
    for (index, policy) in POLICIES.iter().enumerate() {
        println!("{:<20} {}", policy.name, row(&races, index));
    }
    println!("\nby kind of guest: auto's time lost ÷ the optimum's, median and 95th percentile, failures");
    for kind in KINDS {
        let of_kind: Vec<_> = solvable.iter().filter(|race| race.kind == kind).copied().collect();
        let mut lost: Vec<_> = of_kind.iter().filter_map(|race| race.lost_ratio(0)).collect();
        let failed = of_kind.iter().filter(|race| !race.outcomes[0].moved).count();
        println!(
            "  {:<12} {:>6.2} {:>6.2}  {failed} of {}",
            format!("{kind:?}"),
            percentile(&mut lost, 50),
            percentile(&mut lost, 95),
            of_kind.len()
        );
    }
    let worse = races.iter().filter(|race| race.is_beaten()).count();
    println!("\nbeaten by the best of the others by more than 10 % and 2 ms: {worse} of {}", races.len());
    if let Some(path) = &args.plot {
        fs::write(path, plot::svg(&races)).map_err(|error| BenchError::Plot { path: path.clone(), error })?;
    }
    Ok(())
}

/// Plays one guest under all policies.
fn play_race(number: u32, limits: &Limits, args: &TournamentArgs) -> Race {
    let mut random = Random::new(args.seed.wrapping_mul(1_000_003).wrapping_add(number.into()));
    let kind = KINDS[number as usize % KINDS.len()];
    let gigabits = random.one_of(&LINKS);
    let bandwidth = gigabits * 110e6;
    let guest = Guest::of(kind, bandwidth, &mut random);
    let optimum = clairvoyant(&World::new(&guest, bandwidth, limits, None));
    let play = |policy: &policies::Policy| {
        (policy.play)(&mut World::new(&guest, bandwidth, limits, Some(number.into())))
    };
    let race = Race { kind, optimum, outcomes: POLICIES.iter().map(play).collect() };
    let ratio = race.lost_ratio(0).unwrap_or(0.0);
    let failed = race.optimum.is_some() && !race.outcomes[0].moved;
    if args.worse_than.is_some_and(|worse| ratio > worse || failed || race.is_beaten()) {
        println!("guest {number}: {kind:?}, {gigabits} Gb/s, {guest:?}");
        println!("  optimum {:?}", race.optimum);
        for (policy, outcome) in POLICIES.iter().zip(&race.outcomes) {
            println!("  {:<20} {outcome:?}", policy.name);
        }
    }
    race
}

fn row(races: &[Race], policy: usize) -> String {
    let both = races.iter().filter_map(|race| Some((race.optimum?, race.outcomes[policy])));
    let both: Vec<_> = both.filter(|(_, outcome)| outcome.moved).collect();
    let ratio = |of: fn(&Outcome) -> f64| -> Vec<f64> {
        both.iter().map(|(optimum, outcome)| of(outcome) / of(optimum)).collect()
    };
    let mut lost = ratio(|outcome| outcome.lost);
    let sum = both.iter().map(|(_, outcome)| outcome.lost).sum::<f64>()
        / both.iter().map(|(optimum, _)| optimum.lost).sum::<f64>();
    let failed = races.iter().filter(|race| race.optimum.is_some() && !race.outcomes[policy].moved).count();
    let broke = both.iter().filter(|(_, outcome)| outcome.broke_limit).count();
    // What guests lost that did not move.
    let in_vain: f64 =
        races.iter().map(|race| race.outcomes[policy]).filter(|it| !it.moved).map(|it| it.lost).sum();
    format!(
        "{:>7.2} {:>7.2} {:>8.1} {sum:>8.2} {:>7.2} {:>7.2} {failed:>6} {broke:>7} {in_vain:>6.0} s",
        percentile(&mut lost, 50),
        percentile(&mut lost, 95),
        percentile(&mut lost, 100),
        percentile(&mut ratio(|outcome| outcome.total), 50),
        percentile(&mut ratio(|outcome| outcome.sent), 50),
    )
}

/// The nearest rank.
fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get((values.len() * percent).div_ceil(100).max(1) - 1).copied().unwrap_or(f64::NAN)
}
