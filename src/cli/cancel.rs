//! `sterna cancel`: ends a running migration, as long as the guest has not been given away.

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::Args;

use super::exit::Exit;
use super::output::{self, outln};
use super::protocol::{Answer, Request};
use super::socket::{self, ask};

#[derive(Debug, Args)]
pub(crate) struct CancelArgs {
    /// Name of the guest
    #[arg(value_parser = socket::parse_name)]
    name: String,
}

pub(crate) fn run(args: &CancelArgs) -> ExitCode {
    let name = &args.name;
    match ask(name, &Request::Cancel) {
        Ok(Answer::Done) => {}
        Ok(Answer::Failed(failure)) => return output::failed(&failure),
        Ok(other) => return output::error(Exit::Failed, format!("{name} answered {other:?}")),
        Err(error) => return output::error(Exit::Refused, error),
    }
    // The holder will obey; this command waits until it has.
    loop {
        match ask(name, &Request::Status) {
            Ok(Answer::Status(status)) if status.migrating => thread::sleep(Duration::from_millis(50)),
            Ok(Answer::Status(status)) => {
                outln!("{name} stays: its migration is cancelled, and it is {} here", status.vitals.phase);
                return Exit::Done.into();
            }
            Ok(other) => return output::error(Exit::Failed, format!("{name} answered {other:?}")),
            Err(error) => return output::error(Exit::Failed, error),
        }
    }
}
