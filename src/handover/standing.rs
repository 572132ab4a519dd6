use super::{Journal, Record, RecordKind, Side};

/// Where a guest is whose process on this host has ended, by the last record of the host. Ask only while no process has the
/// guest's state file locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing<'journal> {
    /// No record: no guest of this name was ever started on this host, or brought to it.
    Unknown,
    /// It was this host's, and ended with its process. It may be started anew, on one host.
    Ended(&'journal Record),
    /// It was given away, and no answer has told whether it arrived.
    InDoubt(&'journal Record),
    /// The other side has said that it runs the guest.
    Moved(&'journal Record),
    /// It was to come to this host, did not run here and never will: it is its source's.
    AtSource(&'journal Record),
}

impl<'journal> Standing<'journal> {
    /// What the last record says.
    #[must_use]
    pub fn of(journal: &'journal Journal) -> Self {
        journal.last().map_or(Self::Unknown, Self::after)
    }

    /// What this record says, if it is the last.
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

    /// Whether a guest of this name may be started on this host, as far as the host knows.
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
