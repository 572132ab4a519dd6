//! Tables of spreads, as text and as JSON.

use serde_json::{Value, json};

use crate::peers::statistics::Spread;

/// A column of a table: its name and its value for a repetition.
pub(super) type Column<T> = (&'static str, fn(&T) -> f64);

pub(super) fn head(first: &[&'static str], columns: impl IntoIterator<Item = &'static str>) -> String {
    let names: Vec<_> = first.iter().copied().chain(columns).collect();
    format!("| {} |\n|{}", names.join(" | "), "---|".repeat(names.len()))
}

/// A row of a table, and the same as JSON.
pub(super) fn row<T>(first: &[String], columns: &[Column<T>], turns: &[T]) -> (String, Value) {
    let mut line = format!("| {} |", first.join(" | "));
    let mut object = serde_json::Map::new();
    for (name, of) in columns {
        let spread = Spread::of(&turns.iter().map(of).collect::<Vec<_>>());
        line += &format!(" {} |", cell(spread));
        object.insert((*name).to_owned(), value(spread));
    }
    (line, json!({ "row": first, "figures": object }))
}

pub(super) fn cell(spread: Option<Spread>) -> String {
    let text = |Spread { median, min, max }| {
        let digits = if median >= 100.0 { 0 } else { 2 };
        format!("{median:.digits$} ({min:.digits$}–{max:.digits$})")
    };
    spread.map_or("–".into(), text)
}

pub(super) fn value(spread: Option<Spread>) -> Value {
    spread.map_or(
        Value::Null,
        |spread| json!({ "median": spread.median, "min": spread.min, "max": spread.max }),
    )
}
