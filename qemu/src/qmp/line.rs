//! The lines that QEMU sends.

use std::io::{self, BufRead, BufReader, Read};

use serde_json::{Map, Value};
use thiserror::Error;

use super::events::Event;
use crate::text::shown;

/// The longest accepted line, in bytes. The longest answer of QEMU 10, its schema, has 250,000.
pub(super) const LINE_MAX: usize = 4 << 20;

/// How much of a line that is not understood is quoted.
const QUOTE_MAX: usize = 200;

/// A line from QEMU.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Line {
    Greeting,
    Answer { id: Option<u64>, answer: Answer },
    Event(Event),
}

/// QEMU's answer to a command.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Answer {
    Return(Value),
    Error { class: String, description: String },
}

/// Why there are no more lines.
#[derive(Debug, Error)]
pub(super) enum LineError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("QEMU closed it")]
    Closed,
    #[error("a line is longer than {LINE_MAX} bytes")]
    TooLong,
    #[error("a line is not QMP: {0}")]
    Words(String),
}

/// Reads lines.
#[derive(Debug)]
pub(super) struct Lines<R> {
    reader: BufReader<R>,
    line: Vec<u8>,
}

impl<R: Read> Lines<R> {
    pub(super) fn new(reader: R) -> Self {
        Self { reader: BufReader::new(reader), line: Vec::new() }
    }

    /// Waits for the next line.
    pub(super) fn next(&mut self) -> Result<Line, LineError> {
        self.line.clear();
        self.line.shrink_to(1 << 16);
        let max = LINE_MAX as u64 + 1;
        self.reader.by_ref().take(max).read_until(b'\n', &mut self.line)?;
        match self.line.last() {
            _ if self.line.len() > LINE_MAX => Err(LineError::TooLong),
            Some(b'\n') => parse(&self.line),
            // A part of a line is worth nothing.
            _ => Err(LineError::Closed),
        }
    }
}

fn parse(line: &[u8]) -> Result<Line, LineError> {
    let object = serde_json::from_slice::<Map<String, Value>>(line);
    object.ok().and_then(classify).ok_or_else(|| {
        let start = &line[..line.len().min(QUOTE_MAX)];
        LineError::Words(shown(&String::from_utf8_lossy(start)))
    })
}

fn classify(mut object: Map<String, Value>) -> Option<Line> {
    if object.contains_key("QMP") {
        return Some(Line::Greeting);
    }
    if let Some(name) = object.get("event") {
        let name = name.as_str()?.to_owned();
        return Some(Line::Event(Event { name, data: object.remove("data").unwrap_or(Value::Null) }));
    }
    let id = match object.get("id") {
        Some(id) => Some(id.as_u64()?),
        None => None,
    };
    let answer = if let Some(error) = object.get("error") {
        let text = |field| Some(error.get(field)?.as_str()?.to_owned());
        Answer::Error { class: text("class")?, description: shown(&text("desc")?) }
    } else {
        Answer::Return(object.remove("return")?)
    };
    Some(Line::Answer { id, answer })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_kind_of_line_is_told_apart() {
        assert_eq!(parse(br#"{"QMP":{"version":{},"capabilities":[]}}"#).unwrap(), Line::Greeting);
        let returned = Answer::Return(json!({"status":"active"}));
        assert_eq!(
            parse(br#"{"return":{"status":"active"},"id":7}"#).unwrap(),
            Line::Answer { id: Some(7), answer: returned }
        );
        let refused = Answer::Error { class: "GenericError".into(), description: "no".into() };
        assert_eq!(
            parse(br#"{"error":{"class":"GenericError","desc":"no"}}"#).unwrap(),
            Line::Answer { id: None, answer: refused }
        );
        let event = Event { name: "STOP".into(), data: Value::Null };
        assert_eq!(parse(br#"{"timestamp":{},"event":"STOP"}"#).unwrap(), Line::Event(event));
    }

    #[test]
    fn what_is_no_line_of_the_protocol_is_an_error() {
        let deep = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
        for line in [
            &b""[..],
            b"\n",
            b"null",
            b"[1,2]",
            b"{",
            b"{}",
            b"\xff\xfe",
            br#"{"event":7}"#,
            br#"{"error":"text"}"#,
            br#"{"error":{"class":"x"}}"#,
            br#"{"return":1,"id":"text"}"#,
            br#"{"return":1,"id":-1}"#,
            br#"{"return":1} {"return":2}"#,
            &deep,
        ] {
            let shown = String::from_utf8_lossy(&line[..line.len().min(60)]).into_owned();
            assert!(matches!(parse(line), Err(LineError::Words(_))), "{shown}");
        }
    }

    #[test]
    fn a_line_without_end_is_not_kept() {
        let mut endless = Lines::new(io::repeat(b'x'));
        assert!(matches!(endless.next(), Err(LineError::TooLong)));
        assert!(endless.line.len() <= LINE_MAX + 1);
    }

    #[test]
    fn a_line_that_breaks_off_is_no_line() {
        let mut lines = Lines::new(&b"{\"return\":1,\"id\":1}\r\n{\"return\":2,\"id\":2}"[..]);
        assert!(lines.next().is_ok());
        assert!(matches!(lines.next(), Err(LineError::Closed)));
        assert!(matches!(lines.next(), Err(LineError::Closed)));
    }
}
