//! `sterna trust`: this host's key, and the hosts that it trusts.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::json;
use sterna::trust::{Fingerprint, Peer, Rights, TrustError, TrustStore};

use super::exit::Exit;
use super::output::{self, errln, outln};
use super::security::TrustFolder;

/// For `--help`.
const HELP: &str = "\
Two hosts trust each other by two commands on each:
    host-a$ sterna trust show                    host-b$ sterna trust show
    host-a$ sterna trust add host-b SHA256:...   host-b$ sterna trust add host-a SHA256:...";

#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct TrustCommand {
    #[command(subcommand)]
    action: Action,
    #[command(flatten)]
    folder: TrustFolder,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Print the fingerprint of this host's key, which is made if there is none
    Show,
    /// Trust a host by the fingerprint that `sterna trust show` prints there
    Add {
        /// A name for the host in this list, which need not be its name on the network
        name: String,
        /// The fingerprint of its key. A host that changes its key has two for a while
        #[arg(value_name = "FINGERPRINT")]
        fingerprint: Fingerprint,
        /// What the host may do: send guests to this host, receive guests of this host, exchange images, ask
        /// about guests that it has sent earlier
        #[arg(long, value_name = "RIGHT,...", default_value = "send,receive,images,ask")]
        may: Rights,
    },
    /// List the trusted hosts, and what each may do
    List {
        /// Print one JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Trust a host no more, from the next connection on
    Remove {
        /// Its name in the list
        name: String,
        /// Only this key of the host
        #[arg(long, value_name = "FINGERPRINT")]
        key: Option<Fingerprint>,
    },
    /// Replace this host's key. Other hosts refuse this host until they trust the new key
    Rotate,
}

pub(crate) fn run(args: &TrustCommand) -> ExitCode {
    let store = match args.folder.store() {
        Ok(store) => store,
        Err(error) => return output::error(Exit::Refused, error),
    };
    match args.action.carry_out(&store) {
        Ok(()) => Exit::Done.into(),
        Err(error) => output::error(Exit::Refused, error),
    }
}

impl Action {
    fn carry_out(&self, store: &TrustStore) -> Result<(), TrustError> {
        match self {
            Self::Show => outln!("{}", store.host_key()?.fingerprint()),
            Self::Add { name, fingerprint, may } => {
                let (name, fingerprint, rights) = (name.clone(), *fingerprint, *may);
                if fingerprint == store.host_key()?.fingerprint() {
                    errln!("warning: this is the key of this host itself");
                }
                store.add(Peer { name: name.clone(), fingerprint, rights })?;
                outln!("{name} is trusted, and may {rights}");
            }
            Self::List { json } => {
                for Peer { name, fingerprint, rights } in store.trusted()?.iter() {
                    if *json {
                        let (fingerprint, rights) = (fingerprint.to_string(), rights.to_string());
                        let may: Vec<_> = rights.split(',').collect();
                        outln!("{}", json!({ "name": name, "fingerprint": fingerprint, "may": may }));
                    } else {
                        outln!("{name:<20} {fingerprint} {rights}");
                    }
                }
            }
            Self::Remove { name, key } => {
                store.remove(name, *key)?;
                outln!("{name} is not trusted any more{}", if key.is_some() { " by that key" } else { "" });
            }
            Self::Rotate => {
                outln!("{}", store.rotate()?.fingerprint());
                errln!(
                    "this host has a new key: on each other host, `sterna trust add NAME` with it, under the same name as before, \
                     so that guests in doubt are settled, too"
                );
            }
        }
        Ok(())
    }
}
