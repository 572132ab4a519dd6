//! The results, as Markdown for people and as JSON for programs.

use std::fmt::Write;

use serde_json::{Value, json};

use super::ratios::Ratio;
use super::record::{Figure, Record};
use super::statistics::Spread;

/// Both tables.
pub(crate) fn markdown(ratios: &[Ratio], record: &Record) -> String {
    let mut text = String::from("| figure | median | min – max | aim | |\n|---|---|---|---|---|\n");
    for ratio in ratios {
        let verdict = match ratio.is_met() {
            Some(true) => "met".to_owned(),
            Some(false) => "missed".to_owned(),
            None => "not measured".to_owned(),
        };
        let notes = ratio.missing.iter().fold(verdict, |notes, why| notes + "; " + &cell(why));
        let (median, range) = spread(ratio.spread());
        let _ = writeln!(text, "| {} | {median} | {range} | {} | {notes} |", cell(ratio.name), ratio.aim);
    }
    text += "\n| measured | median | min – max | unit | |\n|---|---|---|---|---|\n";
    for figure in record.figures() {
        let (median, range) = spread(figure.spread());
        let _ = writeln!(
            text,
            "| {} | {median} | {range} | {} | {} |",
            cell(&figure.name),
            figure.unit,
            notes(figure)
        );
    }
    text
}

/// Both tables as JSON.
pub(crate) fn json(ratios: &[Ratio], record: &Record) -> Value {
    let spread = |spread: Option<Spread>| match spread {
        Some(Spread { median, min, max }) => json!({ "median": median, "min": min, "max": max }),
        None => Value::Null,
    };
    let ratios: Vec<Value> = ratios
        .iter()
        .map(|ratio| {
            json!({
                "name": ratio.name,
                "aim": ratio.aim.to_string(),
                "met": ratio.is_met(),
                "spread": spread(ratio.spread()),
                "values": ratio.values,
                "missing": ratio.missing,
            })
        })
        .collect();
    let figures: Vec<Value> = record
        .figures()
        .iter()
        .map(|figure| {
            json!({
                "name": figure.name,
                "unit": figure.unit,
                "spread": spread(figure.spread()),
                "values": figure.values(),
                "failures": figure.failures().iter().map(|(why, times)| json!({ "why": why, "times": times })).collect::<Vec<_>>(),
            })
        })
        .collect();
    json!({ "ratios": ratios, "measured": figures })
}

fn notes(figure: &Figure) -> String {
    let failures = figure.failures();
    let notes: Vec<String> =
        failures.iter().map(|(why, times)| format!("{times} ×: {}", cell(why))).collect();
    notes.join("; ")
}

fn spread(spread: Option<Spread>) -> (String, String) {
    match spread {
        Some(Spread { median, min, max }) => (number(median), format!("{} – {}", number(min), number(max))),
        None => ("–".into(), "–".into()),
    }
}

/// Three significant figures.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        0.1.. => 3,
        0.0 => 0,
        _ => 5,
    };
    format!("{value:.digits$}")
}

/// Text with the characters escaped that would break a table.
fn cell(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peers::ratios::{names, ratios};

    #[test]
    fn numbers_are_as_long_as_they_are_true() {
        for (value, text) in [
            (1234.5, "1234"),
            (12.34, "12.3"),
            (1.234, "1.23"),
            (0.9512, "0.951"),
            (0.00001, "0.00001"),
            (0.0, "0"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn a_peer_that_failed_stays_in_the_tables_with_its_reason() {
        let mut record = Record::default();
        record.note(names::TCP_ONE, "MB/s", Err("iperf3 | is not\ninstalled".into()));
        record.note(names::TCP_LANES_ONE, "MB/s", Ok(500.0));
        let ratios = ratios(&record, 1 << 30, 100);
        let text = markdown(&ratios, &record);
        let row = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap().to_owned();
        assert_eq!(
            row("| TCP lane / iperf3"),
            "| TCP lane / iperf3, 1 stream | – | – | ≥ 0.95 | not measured; iperf3 \\| is not installed |"
        );
        assert_eq!(
            row("| iperf3, 1"),
            "| iperf3, 1 stream | – | – | MB/s | 1 ×: iperf3 \\| is not installed |"
        );
        assert_eq!(row("| TCP lane"), row("| TCP lane /"));
        let json = json(&ratios, &record);
        assert_eq!(json["measured"][0]["failures"][0]["times"], 1);
        assert_eq!(json["measured"][1]["spread"]["median"], 500.0);
        assert!(json["ratios"][0]["met"].is_null());
    }

    #[test]
    fn met_and_missed_are_told_apart() {
        let mut record = Record::default();
        record.note(names::LIMIT_LANES, "MB/s", Ok(100.0));
        record.note(names::LANES, "MB/s", Ok(94.0));
        record.note(names::READ, "MB/s", Ok(100.0));
        record.note(names::ZERO_TEST, "MB/s", Ok(99.0));
        let text = markdown(&ratios(&record, 1 << 30, 100), &record);
        assert!(text.contains("| 0.940 | 0.940 – 0.940 | ≥ 0.95 | missed |"), "{text}");
        assert!(text.contains("| 0.990 | 0.990 – 0.990 | ≥ 0.9 | met |"), "{text}");
    }
}
