//! A client of QEMU's machine protocol: JSON objects, one a line, over a unix socket.
//!
//! QEMU is a peer like others: its messages are bounded, and each wait has a limit.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use thiserror::Error;

/// The longest accepted line, in bytes. Answers to this client's commands have a few thousand.
const LINE_MAX: usize = 1 << 18;

/// How many events are kept until a caller asks for them; older ones are dropped.
const EVENTS_MAX: usize = 256;

/// The longest wait for an answer. `migrate` answers once it is connected, which takes longest with RDMA.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// The errors of QMP.
#[derive(Debug, Error)]
pub(crate) enum QmpError {
    #[error("the QMP connection broke: {0}")]
    Io(#[from] io::Error),
    #[error("QMP was closed: QEMU has ended")]
    Closed,
    #[error("no answer to {0} in time")]
    Late(String),
    #[error("a QMP line is longer than {LINE_MAX} bytes")]
    TooLong,
    #[error("a QMP line is not understood: {0}")]
    Words(String),
    #[error("{command}: {description}")]
    Refused { command: String, description: String },
    #[error("the migration failed: {0}")]
    Migration(String),
}

/// A line from QEMU.
#[derive(Clone, Debug, PartialEq)]
enum Line {
    Greeting,
    Return(Value),
    Error(String),
    Event(Event),
}

/// An event in QEMU.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Event {
    pub(super) name: String,
    pub(super) data: Value,
}

#[derive(Debug)]
pub(super) struct Qmp {
    stream: UnixStream,
    /// Bytes that were read and not parsed yet, possibly a partial line.
    unread: VecDeque<u8>,
    events: VecDeque<Event>,
}

impl Qmp {
    /// Connects, and completes the greeting.
    pub(super) fn connect(path: &Path) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(path)?;
        let mut qmp = Self { stream, unread: VecDeque::new(), events: VecDeque::new() };
        match qmp.line("greeting", Instant::now() + ANSWER_MAX)? {
            Line::Greeting => {}
            other => return Err(QmpError::Words(format!("{other:?} instead of a greeting"))),
        }
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Makes QEMU execute a command; returns its answer.
    pub(super) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, QmpError> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.stream.set_write_timeout(Some(ANSWER_MAX))?;
        self.stream.write_all(format!("{request}\n").as_bytes())?;
        let deadline = Instant::now() + ANSWER_MAX;
        loop {
            match self.line(command, deadline)? {
                Line::Return(answer) => return Ok(answer),
                Line::Error(description) => {
                    return Err(QmpError::Refused { command: command.to_owned(), description });
                }
                Line::Event(event) => self.keep(event),
                Line::Greeting => return Err(QmpError::Words("a second greeting".into())),
            }
        }
    }

    /// The next event with this name.
    pub(super) fn event(&mut self, name: &str, deadline: Instant) -> Result<Event, QmpError> {
        loop {
            while let Some(event) = self.events.pop_front() {
                if event.name == name {
                    return Ok(event);
                }
            }
            if let Line::Event(event) = self.line(name, deadline)? {
                self.keep(event);
            }
        }
    }

    fn keep(&mut self, event: Event) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn line(&mut self, awaited: &str, deadline: Instant) -> Result<Line, QmpError> {
        loop {
            if let Some(end) = self.unread.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                return parse(&line);
            }
            if self.unread.len() > LINE_MAX {
                return Err(QmpError::TooLong);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let late = || QmpError::Late(awaited.to_owned());
            if left.is_zero() {
                return Err(late());
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(QmpError::Closed),
                Ok(count) => self.unread.extend(&bytes[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(late()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn parse(line: &[u8]) -> Result<Line, QmpError> {
    let not_understood = || QmpError::Words(String::from_utf8_lossy(line).chars().take(200).collect());
    if line.len() > LINE_MAX {
        return Err(QmpError::TooLong);
    }
    let Ok(Value::Object(mut object)) = serde_json::from_slice(line) else { return Err(not_understood()) };
    if object.contains_key("QMP") {
        return Ok(Line::Greeting);
    }
    if let Some(name) = object.get("event") {
        let name = name.as_str().ok_or_else(not_understood)?.to_owned();
        return Ok(Line::Event(Event { name, data: object.remove("data").unwrap_or(Value::Null) }));
    }
    if let Some(error) = object.get("error") {
        let description = error["desc"].as_str().ok_or_else(not_understood)?;
        return Ok(Line::Error(description.to_owned()));
    }
    object.remove("return").map(Line::Return).ok_or_else(not_understood)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    #[test]
    fn each_kind_of_line_is_known() {
        assert_eq!(parse(br#"{"QMP":{"version":{},"capabilities":[]}}"#).unwrap(), Line::Greeting);
        assert_eq!(
            parse(br#"{"return":{"status":"active"}}"#).unwrap(),
            Line::Return(json!({"status":"active"}))
        );
        let error = parse(br#"{"error":{"class":"GenericError","desc":"no"}}"#).unwrap();
        assert_eq!(error, Line::Error("no".into()));
        let event = parse(br#"{"timestamp":{},"event":"STOP"}"#).unwrap();
        assert_eq!(event, Line::Event(Event { name: "STOP".into(), data: Value::Null }));
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
            br#"{"return":1} {"return":2}"#,
            &deep,
        ] {
            let shown = String::from_utf8_lossy(&line[..line.len().min(60)]).into_owned();
            assert!(matches!(parse(line), Err(QmpError::Words(_))), "{shown}");
        }
        assert!(matches!(parse(&vec![b' '; LINE_MAX + 1]), Err(QmpError::TooLong)));
    }

    /// A QEMU that sends `bytes` to its first client, and then reads until that client hangs up.
    fn connect_to(bytes: Vec<u8>) -> Result<Qmp, QmpError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let says = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let qmp = Qmp::connect(&path);
        // A client keeps it open until the client is dropped.
        if qmp.is_err() {
            says.join().unwrap();
        }
        qmp
    }

    const GREETING: &str = "{\"QMP\":{}}\r\n";

    #[test]
    fn events_are_kept_while_an_answer_is_awaited() {
        let said = format!(
            "{GREETING}{{\"event\":\"A\",\"data\":{{\"n\":1}}}}\n{{\"return\":{{}}}}\n{{\"event\":\"B\"}}\n"
        );
        let mut qmp = connect_to(said.into_bytes()).unwrap();
        let soon = Instant::now() + Duration::from_secs(20);
        assert_eq!(qmp.event("A", soon).unwrap().data["n"], 1);
        assert_eq!(qmp.event("B", soon).unwrap().name, "B");
        assert!(matches!(qmp.event("C", soon), Err(QmpError::Closed)));
    }

    #[test]
    fn a_peer_that_is_no_qemu_is_refused() {
        assert!(matches!(connect_to(b"{\"return\":{}}\n".to_vec()), Err(QmpError::Words(_))));
        assert!(matches!(connect_to(b"HTTP/1.1 400 Bad Request\r\n".to_vec()), Err(QmpError::Words(_))));
        assert!(matches!(connect_to(Vec::new()), Err(QmpError::Closed)));
        assert!(matches!(connect_to(vec![b'x'; LINE_MAX * 2]), Err(QmpError::TooLong)));
        let refused = format!("{GREETING}{{\"error\":{{\"desc\":\"not now\"}}}}\n");
        assert!(matches!(connect_to(refused.into_bytes()), Err(QmpError::Refused { .. })));
    }

    #[test]
    fn silence_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let _listener = UnixListener::bind(&path).unwrap();
        let stream = UnixStream::connect(&path).unwrap();
        let mut qmp = Qmp { stream, unread: VecDeque::new(), events: VecDeque::new() };
        let soon = Instant::now() + Duration::from_millis(20);
        assert!(matches!(qmp.event("STOP", soon), Err(QmpError::Late(_))));
    }
}
