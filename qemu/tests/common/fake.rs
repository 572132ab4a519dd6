//! A QEMU that follows a script.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::{self, JoinHandle};

use serde_json::{Value, json};
use tempfile::TempDir;

pub const GREETING: &str = "{\"QMP\":{\"version\":{},\"capabilities\":[]}}\r\n";

/// A socket with a script behind it.
pub struct Fake {
    pub path: PathBuf,
    _folder: TempDir,
    script: JoinHandle<()>,
}

/// One client of the fake.
pub struct Session {
    pub stream: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Fake {
    /// Runs the script, which takes its clients from the listener.
    pub fn start(script: impl FnOnce(&UnixListener) + Send + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        Self { path, _folder: folder, script: thread::spawn(move || script(&listener)) }
    }

    /// Answers each command by this function, for one client after the other.
    pub fn answering(mut answer: impl FnMut(&str, &Value) -> Value + Send + 'static) -> Self {
        Self::start(move |listener| {
            loop {
                let mut session = Session::accept(listener);
                while let Some(command) = session.command() {
                    if command["execute"] == "end of the fake" {
                        return;
                    }
                    let answer = answer(command["execute"].as_str().unwrap(), &command["arguments"]);
                    session.answer(&command, &answer);
                }
            }
        })
    }

    /// Waits for the end of the script, and fails if it failed.
    pub fn finish(self) {
        self.script.join().unwrap();
    }
}

impl Session {
    /// Takes a client, greets it, and answers its first command.
    pub fn accept(listener: &UnixListener) -> Self {
        let mut session = Self::accept_silently(listener);
        session.say(GREETING);
        if let Some(first) = session.command() {
            assert_eq!(first["execute"], "qmp_capabilities");
            session.answer(&first, &json!({}));
        }
        session
    }

    pub fn accept_silently(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().unwrap();
        let reader = BufReader::new(stream.try_clone().unwrap());
        Self { stream, reader }
    }

    /// The next command; none if the client has gone.
    pub fn command(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) | Err(_) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap()),
        }
    }

    pub fn answer(&mut self, command: &Value, answer: &Value) {
        let mut line = match answer.get("error") {
            Some(error) => json!({ "error": error }),
            None => json!({ "return": answer }),
        };
        line["id"] = command["id"].clone();
        self.say(&format!("{line}\r\n"));
    }

    /// Sends bytes; the client may have gone.
    pub fn say(&mut self, text: &str) {
        let _ = self.stream.write_all(text.as_bytes());
    }

    pub fn end(self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// QEMU's answer to a command that it does not have.
pub fn no_such_command() -> Value {
    json!({ "error": { "class": "CommandNotFound", "desc": "The command has not been found" } })
}

/// QEMU's refusal.
pub fn refusal(text: &str) -> Value {
    json!({ "error": { "class": "GenericError", "desc": text } })
}
