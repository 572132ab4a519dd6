//! `sterna list`: the guests of this host, running and arriving, and those that an operator has to settle.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::Args;
use sterna::state::{HostState, LockHolder, Standing};

use super::contact::Contact;
use super::exit::Exit;
use super::output::{self, outln};
use super::protocol::{Answer, GuestKind, Request, Status};
use super::size::Size;
use super::socket::{SocketError, directory, name_of_socket, try_ask_in};
use super::state::StateArgs;

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// List also guests of which this host has no more than a record: that ended here, or are at another host
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    state: StateArgs,
    /// Print the list as one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &ListArgs) -> ExitCode {
    let state = match args.state.state() {
        Ok(state) => state,
        Err(error) => return output::error(Exit::Refused, error),
    };
    let mut rows = rows(&state);
    rows.retain(|row| args.all || !row.is_history());
    if args.json {
        let guests: Vec<_> = rows.iter().map(Row::json).collect();
        outln!("{}", serde_json::json!({ "guests": guests }));
    } else {
        table(&rows).iter().for_each(|line| outln!("{line}"));
    }
    Exit::Done.into()
}

/// A guest, and what is known about it.
#[derive(Debug, PartialEq)]
struct Row {
    name: String,
    state: State,
    /// The process that has it.
    process: Option<u32>,
    /// The other side of its last attempt, if the guest may be there.
    peer: Option<String>,
    status: Option<Status>,
}

/// Where a guest is.
#[derive(Clone, Debug, PartialEq)]
enum State {
    /// As its process says.
    Said(String),
    InDoubt,
    Moved,
    AtSource,
    Ended,
    /// A process has it and does not answer.
    Silent,
    /// Its state file cannot be read.
    Unreadable,
}

impl State {
    fn word(&self) -> &str {
        match self {
            Self::Said(word) => word,
            Self::InDoubt => "in-doubt",
            Self::Moved => "moved",
            Self::AtSource => "at-source",
            Self::Ended => "ended",
            Self::Silent => "no-answer",
            Self::Unreadable => "unreadable",
        }
    }
}

/// All guests with a state file or a control socket, by name.
fn rows(state: &HostState) -> Vec<Row> {
    let sockets = directory();
    let mut names: BTreeSet<String> = state.names().into_iter().collect();
    names.extend(names_of_sockets(&sockets));
    let names: Vec<_> = names.into_iter().collect();
    let mut rows = Vec::new();
    // A process that hangs takes its time, and the others are not to wait for it.
    for together in names.chunks(ASKED_TOGETHER) {
        thread::scope(|scope| {
            let asking: Vec<_> =
                together.iter().map(|name| scope.spawn(|| row(state, &sockets, name))).collect();
            rows.extend(asking.into_iter().filter_map(|row| row.join().ok().flatten()));
        });
    }
    rows
}

fn names_of_sockets(folder: &Path) -> Vec<String> {
    // Without the folder no process of this user has a guest.
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries.flatten().filter_map(|entry| name_of_socket(entry.file_name().to_str()?)).collect()
}

/// One guest; `None` if nothing is known about it.
fn row(state: &HostState, sockets: &Path, name: &str) -> Option<Row> {
    let (sighting, unreadable) = match state.look(name) {
        Ok(sighting) => (sighting, false),
        Err(error) => {
            tracing::warn!("{error}");
            (None, true)
        }
    };
    let holder = sighting.as_ref().and_then(|sighting| sighting.holder.as_ref());
    let process = holder.and_then(|holder| holder.process);
    let row = |state, peer, status| Some(Row { name: name.to_owned(), state, process, peer, status });
    match ask(name, sockets, holder) {
        Ok(Answer::Status(status)) => return row(State::Said(said(&status).into()), None, Some(status)),
        Ok(Answer::Arriving { phase }) => return row(State::Said(phase), None, None),
        // A socket that a killed process has left.
        Err(SocketError::NoGuest { .. }) if holder.is_none() => {}
        Ok(_) | Err(_) => return row(State::Silent, None, None),
    }
    if unreadable {
        return row(State::Unreadable, None, None);
    }
    let sighting = sighting.as_ref()?;
    match Standing::of(&sighting.journal) {
        Standing::InDoubt(last) => row(State::InDoubt, Some(last.peer.clone()), None),
        Standing::Moved(last) => row(State::Moved, Some(last.peer.clone()), None),
        Standing::AtSource(last) => row(State::AtSource, Some(last.peer.clone()), None),
        Standing::Ended(_) => row(State::Ended, None, None),
        Standing::Unknown => None,
    }
}

/// Asks the process that has the guest, at the folder that it announced or at this command's.
fn ask(name: &str, sockets: &Path, holder: Option<&LockHolder>) -> Result<Answer, SocketError> {
    let contact = holder.and_then(Contact::of);
    let folder = contact.as_ref().map_or(sockets, |contact| &contact.sockets);
    try_ask_in(folder, name, &Request::List, ANSWERS_WITHIN)
}

fn said(status: &Status) -> &str {
    match status {
        Status { in_doubt: true, .. } => "in-doubt",
        Status { migrating: true, .. } => "migrating",
        status => &status.vitals.phase,
    }
}

impl Row {
    /// Whether the guest is neither on this host nor to be settled on it.
    fn is_history(&self) -> bool {
        matches!(self.state, State::Moved | State::AtSource | State::Ended)
    }

    fn json(&self) -> serde_json::Value {
        let vitals = self.status.as_ref().map(|status| &status.vitals);
        serde_json::json!({
            "name": self.name,
            "state": self.state.word(),
            "process": self.process,
            "peer": self.peer,
            "kind": vitals.map(|vitals| kind(vitals.kind)),
            "memory_bytes": vitals.map(|vitals| vitals.memory_bytes),
            "vcpus": vitals.map(|vitals| vitals.vcpus),
            "insecure": self.status.as_ref().map(|status| status.insecure),
        })
    }

    fn cells(&self) -> [String; 7] {
        let vitals = self.status.as_ref().map(|status| &status.vitals);
        let or_dash = |cell: Option<String>| cell.unwrap_or_else(|| "-".into());
        [
            self.name.clone(),
            self.state.word().to_owned(),
            or_dash(vitals.map(|vitals| Size(vitals.memory_bytes).to_string())),
            or_dash(vitals.map(|vitals| vitals.vcpus.to_string())),
            or_dash(vitals.map(|vitals| kind(vitals.kind).to_owned())),
            or_dash(self.process.map(|process| process.to_string())),
            or_dash(self.peer.clone()),
        ]
    }
}

fn kind(kind: GuestKind) -> &'static str {
    match kind {
        GuestKind::Kvm => "kvm",
        GuestKind::Synthetic => "synthetic",
        GuestKind::Qemu => "qemu",
    }
}

/// The lines of a table; without guests only its head.
fn table(rows: &[Row]) -> Vec<String> {
    let head = ["NAME", "STATE", "MEMORY", "VCPUS", "KIND", "PROCESS", "PEER"].map(str::to_owned);
    let lines: Vec<_> = [head].into_iter().chain(rows.iter().map(Row::cells)).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..7).map(width).collect();
    let padded = |line: &[String; 7]| {
        let cells = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    lines.iter().map(padded).collect()
}

/// How many processes are asked at once.
const ASKED_TOGETHER: usize = 32;

/// How long a process may take to answer. It does nothing for the answer.
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let of = |name: &str, state, peer: Option<&str>| Row {
            name: name.into(),
            state,
            process: Some(7),
            peer: peer.map(str::to_owned),
            status: None,
        };
        let rows =
            [of("tern", State::Said("arriving".into()), None), of("gull-2", State::InDoubt, Some("host-b"))];
        assert_eq!(
            table(&rows),
            [
                "NAME    STATE     MEMORY  VCPUS  KIND  PROCESS  PEER",
                "tern    arriving  -       -      -     7        -",
                "gull-2  in-doubt  -       -      -     7        host-b",
            ]
        );
        assert_eq!(table(&[]).len(), 1);
    }
}
