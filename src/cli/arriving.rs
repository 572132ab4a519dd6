//! A guest that is on its way to this host: all that can be asked of it is what is to become of it.

use std::os::unix::net::UnixStream;

use sterna::destination::Held;

use super::exit::Exit;
use super::protocol::{Answer, Found, Request};
use super::server::{Asked, Serve, Served};
use super::socket::write_line;

/// Answers for it until it has arrived.
#[derive(Debug)]
pub(crate) struct Arriving {
    pub(crate) held: Held,
}

impl Serve for Arriving {
    fn serve(&self, asked: Asked, mut stream: UnixStream) -> Served {
        let Ok(Request::Recover { run_destination, .. }) = asked else {
            return Served::NotYet(Box::new(asked), stream);
        };
        // Whoever asked may be gone.
        let _ = write_line(&mut stream, &Answer::Found(self.found(run_destination)));
        Served::Done
    }
}

impl Arriving {
    fn found(&self, run_destination: bool) -> Found {
        match if run_destination { self.held.source_is_fenced() } else { Ok(false) } {
            Ok(true) => {
                let what = "is run here, on the word that the other host is fenced".into();
                return Found { exit: Exit::Done, what };
            }
            Ok(false) => {}
            Err(error) => {
                let what = format!("is ready to run here, and is not run without its lock: {error}");
                return Found { exit: Exit::InDoubt, what };
            }
        }
        match self.held.left() {
            Some(left) => Found {
                exit: Exit::InDoubt,
                what: format!(
                    "is ready to run here, and its source is lost: it is held for {} s more and given up then. \
                     If the source's host is fenced: --run-destination --other-host-is-fenced",
                    left.as_secs()
                ),
            },
            None if run_destination => Found {
                exit: Exit::Refused,
                what: "is on its way here, and its source is not lost: there is nothing to give a word for"
                    .into(),
            },
            None => Found { exit: Exit::Done, what: "is on its way here; it runs at the source".into() },
        }
    }
}
