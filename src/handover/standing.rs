use super::journal::{Journal, Record, RecordKind, Side};

/// Where a guest is after its process on this host has ended, by the host's last record. Valid only while no
/// process has the guest's state file locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing<'journal> {
    /// No record: no guest of this name was ever started on this host or brought to it.
    Unknown,
    /// The guest was on this host and ended with its process. It may be started anew, on one host.
    Ended(&'journal Record),
    /// The guest was handed over, and no answer has said whether it arrived.
    InDoubt(&'journal Record),
    /// The other side has reported that it runs the guest.
    Moved(&'journal Record),
    /// The guest was to come to this host, did not run on it and never will: its source has it.
    AtSource(&'journal Record),
}

impl<'journal> Standing<'journal> {
    /// The standing by the last record.
    #[must_use]
    pub fn of(journal: &'journal Journal) -> Self {
        journal.last().map_or(Self::Unknown, Self::after)
    }

    /// The standing by this record, if it is the last.
    #[must_use]
    pub fn after(last: &'journal Record) -> Self {
        match (last.mark, last.side) {
            (RecordKind::Started | RecordKind::Running, _) | (RecordKind::Refused, Side::Source) => {
                Self::Ended(last)
            }
            (RecordKind::Committed, _) => Self::InDoubt(last),
            (RecordKind::Done, _) => Self::Moved(last),
            (RecordKind::Prepared, _) | (RecordKind::Refused, Side::Destination) => Self::AtSource(last),
        }
    }

    /// Whether this host's records allow a guest of this name to start.
    #[must_use]
    pub fn may_start(self) -> bool {
        matches!(self, Self::Unknown | Self::Ended(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::AttemptId;

    fn standing_after(records: &[(RecordKind, Side)]) -> (String, bool) {
        let mut journal = Journal::empty();
        for (number, &(mark, side)) in (1..).zip(records) {
            journal.add(Record {
                mark,
                side,
                attempt_id: AttemptId([number; 16]),
                peer: String::new(),
                address: None,
                identity: None,
            });
        }
        let standing = Standing::of(&journal);
        let name = format!("{standing:?}");
        (name.split('(').next().unwrap_or_default().to_owned(), standing.may_start())
    }

    #[test]
    fn the_last_record_says_where_the_guest_is_also_after_it_came_back() {
        use Side::{Destination, Source};
        let left =
            [(RecordKind::Started, Source), (RecordKind::Committed, Source), (RecordKind::Done, Source)];
        let back =
            [&left[..], &[(RecordKind::Prepared, Destination), (RecordKind::Running, Destination)]].concat();
        let refused =
            [&left[..], &[(RecordKind::Prepared, Destination), (RecordKind::Refused, Destination)]].concat();
        type Marks<'a> = &'a [(RecordKind, Side)];
        let cases: [(Marks<'_>, &str, bool); 8] = [
            (&[], "Unknown", true),
            (&left[..1], "Ended", true),
            (&left[..2], "InDoubt", false),
            (&left, "Moved", false),
            (&back, "Ended", true),
            (&back[..4], "AtSource", false),
            (&refused, "AtSource", false),
            (&[(RecordKind::Committed, Source), (RecordKind::Refused, Source)], "Ended", true),
        ];
        for (records, name, may_start) in cases {
            assert_eq!(standing_after(records), (name.to_owned(), may_start), "{records:?}");
        }
    }
}
