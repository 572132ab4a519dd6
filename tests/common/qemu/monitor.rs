//! QEMU's monitor, as the tests use it: each call asks and waits for the answer.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};

use super::wait::{PATIENCE, wait_for};

#[derive(Debug)]
pub(crate) struct Monitor {
    path: PathBuf,
    connection: Mutex<Option<BufReader<UnixStream>>>,
}

impl Monitor {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, connection: Mutex::default() }
    }

    /// Whether QEMU has opened the socket and answers.
    pub(super) fn connect(&self) -> bool {
        let Ok(stream) = UnixStream::connect(&self.path) else { return false };
        stream.set_read_timeout(Some(PATIENCE)).expect("a limit that is not zero");
        let mut connection = BufReader::new(stream);
        read(&mut connection).expect("QEMU greets");
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection);
        self.execute("qmp_capabilities", json!({}));
        true
    }

    /// The answer to a command.
    #[track_caller]
    pub(crate) fn execute(&self, command: &str, arguments: Value) -> Value {
        self.try_execute(command, arguments).unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// The answer to a command, or the text of QEMU's error.
    pub(crate) fn try_execute(&self, command: &str, arguments: Value) -> Result<Value, String> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let connection = connection.as_mut().ok_or("not connected")?;
        let request = Value::from_iter([("execute", command.into()), ("arguments", arguments)]);
        connection.get_mut().write_all(request.to_string().as_bytes()).map_err(|error| error.to_string())?;
        loop {
            let mut answer = read(connection)?;
            if let Some(error) = answer.get("error") {
                return Err(error["desc"].as_str().unwrap_or_default().to_owned());
            }
            // Events come in between.
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Switches capabilities of the migration on or off.
    pub(crate) fn set_capabilities(&self, capabilities: &[(&str, bool)]) {
        let capabilities: Vec<_> = capabilities
            .iter()
            .map(|(capability, state)| json!({ "capability": capability, "state": state }))
            .collect();
        self.execute("migrate-set-capabilities", json!({ "capabilities": capabilities }));
    }

    /// Waits until `query-migrate` reports one of these states, and returns it.
    #[track_caller]
    pub(crate) fn wait_for_migration(&self, states: &[&str]) -> String {
        let mut state = String::new();
        wait_for(&format!("the migration is {states:?}"), || {
            let answer = self.execute("query-migrate", json!({}));
            state = answer["status"].as_str().unwrap_or_default().to_owned();
            assert!(state != "failed" || states.contains(&"failed"), "{answer}");
            states.contains(&state.as_str())
        });
        state
    }

    /// Says `quit`; QEMU may end before it answers.
    pub(super) fn quit(&self) {
        let _ = self.try_execute("quit", json!({}));
    }
}

fn read(connection: &mut BufReader<UnixStream>) -> Result<Value, String> {
    let mut line = String::new();
    match connection.read_line(&mut line) {
        Ok(0) => Err("QEMU closed its monitor".to_owned()),
        Ok(_) => serde_json::from_str(&line).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}
