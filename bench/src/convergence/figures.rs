//! The figures, each a table.

use super::error::BenchError;
use super::migration::Demo;
use crate::peers::statistics::percentile;

/// The accuracy of a bandwidth limit: at the link's rate, at a fourth and at four times that, beside no
/// limit.
pub(super) fn pace(demo: &Demo, link_mbps: u64) -> Result<(), BenchError> {
    println!("bandwidth limit kept: an idle guest, pages a second over the limit");
    let mut limits = vec![0, link_mbps / 4, link_mbps, link_mbps * 4];
    limits.dedup();
    for limit in limits {
        let how = [format!("--bandwidth-limit={limit}"), "--dirty-rate=0".into()];
        let Some(migration) = demo.migrate(&how)? else { continue };
        let sent = migration.throughput_mbps();
        match limit {
            0 => println!("  no limit    {sent:>7.1} MB/s"),
            _ => println!("  {limit:>4} MB/s   {sent:>7.1} MB/s  {:>6.3}", sent / limit as f64),
        }
    }
    println!();
    Ok(())
}

/// Guests at 0.5, 0.7 and 0.85 of the link, with 50 ms of downtime allowed and no throttling.
///
/// The ideal sends all of RAM, then the share that was written meanwhile, then the share written in that
/// time, and so on: RAM ÷ (1 − rate ÷ link).
pub(super) fn shares(demo: &Demo, link_mbps: u64) -> Result<(), BenchError> {
    println!("guests at shares of the link, 50 ms allowed, no throttling");
    println!("  asked  wrote  rounds   total s  downtime ms  bytes sent / ideal");
    for percent in [50, 70, 85] {
        let how = [
            format!("--bandwidth-limit={link_mbps}"),
            format!("--dirty-rate={}", link_mbps * percent / 100),
            "--downtime-limit=50".into(),
            "--throttle-max=0".into(),
            "--if-stuck=abort".into(),
        ];
        let asked = percent as f64 / 100.0;
        let Some(migration) = demo.migrate(&how)? else {
            println!("  {asked:>5.2}  did not converge");
            continue;
        };
        let share = migration.dirty_rate_mbps() / link_mbps as f64;
        let first_bytes = migration.per_round.first().map_or(0, |round| round.bytes) as f64;
        println!(
            "  {asked:>5.2}  {share:>5.2}  {:>6}  {:>8.2}  {:>11.1}  {:>18.3}",
            migration.per_round.len(),
            migration.total_ms / 1e3,
            migration.downtime_ms,
            migration.bytes_sent as f64 * (1.0 - share) / first_bytes,
        );
    }
    println!();
    Ok(())
}

/// The guest's beats in each round, as a share of its rate before.
pub(super) fn slowdown(demo: &Demo, link_mbps: u64) -> Result<(), BenchError> {
    println!("the guest's heartbeat in each round, that before as 1 (a guest at 0.5 of the link)");
    let how = [
        format!("--bandwidth-limit={link_mbps}"),
        format!("--dirty-rate={}", link_mbps / 2),
        "--downtime-limit=50".into(),
    ];
    if let Some(migration) = demo.migrate(&how)? {
        for (number, round) in (1..).zip(migration.running()) {
            let share = round.heartbeats_per_second.zip(migration.heartbeats_per_second);
            let share = share.map_or("too few beats".into(), |(now, before)| format!("{:.3}", now / before));
            println!("  round {number:>2}, {:>5.0} ms  {share}", round.ms);
        }
    }
    println!();
    Ok(())
}

/// Predicted against measured downtime of thirty migrations: ten rates from none to 1.2 of the link, three
/// limits. Each guest switches as soon as its limit is met: by the default policy most would go on to a few
/// milliseconds, the same for all.
pub(super) fn prediction(demo: &Demo, link_mbps: u64) -> Result<(), BenchError> {
    println!("predicted and measured downtime, ms");
    println!(
        "  rate  limit  rounds  slowed  predicted  measured  error      send  other, predicted and measured"
    );
    let mut errors = Vec::new();
    for limit_ms in [50, 100, 300] {
        for tenths in [0, 1, 2, 3, 4, 5, 6, 7, 9, 12] {
            let rate = link_mbps * tenths / 10;
            let how = [
                format!("--bandwidth-limit={link_mbps}"),
                format!("--dirty-rate={rate}"),
                format!("--downtime-limit={limit_ms}"),
                "--if-stuck=throttle".into(),
            ];
            let Some(migration) = demo.migrate(&how)? else {
                println!("  {rate:>4}  {limit_ms:>5}  did not converge");
                continue;
            };
            let (predicted, measured) = (migration.downtime_predicted, migration.downtime_measured);
            let error = predicted.total_ms / measured.total_ms - 1.0;
            errors.push(error.abs());
            println!(
                "  {rate:>4}  {limit_ms:>5}  {:>6}  {:>4} %  {:>9.1}  {:>8.1}  {:>+4.0} %  {:>4.1} {:>4.1}  {:>3.1} {:>3.1}",
                migration.per_round.len(),
                migration.per_round.last().map_or(0, |round| round.throttle_percent),
                predicted.total_ms,
                measured.total_ms,
                error * 100.0,
                predicted.send_ms,
                measured.send_ms,
                predicted.total_ms - predicted.send_ms,
                measured.total_ms - measured.send_ms,
            );
        }
    }
    let within = |percent| percentile(&errors, percent);
    if let (Some(half), Some(nine_tenths), Some(all)) = (within(50), within(90), within(100)) {
        println!(
            "  of {} migrations: half within {:.0} %, nine tenths within {:.0} %, all within {:.0} %",
            errors.len(),
            half * 100.0,
            nine_tenths * 100.0,
            all * 100.0
        );
    }
    println!();
    Ok(())
}
