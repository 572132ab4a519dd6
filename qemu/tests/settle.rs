//! What becomes of a guest whose migration ended early, by its owner and by QEMU's state.

mod common;

use std::sync::{Arc, Mutex};

use common::fake::{Fake, Session, refusal};
use serde_json::{Value, json};
use sterna_qemu::error::QemuError;
use sterna_qemu::monitor::{Monitor, RunState};
use sterna_qemu::qmp::{Client, QmpError};
use sterna_qemu::settle::{Owner, Settled, settle};

/// A QEMU as far as these commands are concerned.
#[derive(Clone, Debug)]
struct State {
    run: &'static str,
    migration: &'static str,
    note: Option<Value>,
    /// What becomes of `cont`.
    cont: Cont,
    /// How often the state is asked for before a failed migration lets the guest run.
    runs_after: u32,
    /// The commands that change something.
    done: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cont {
    Answered,
    /// QEMU executes it, and the connection breaks.
    Lost,
    Refused,
}

struct Case {
    state: Arc<Mutex<State>>,
    fake: Fake,
    monitor: Monitor,
}

fn case(run: &'static str, migration: &'static str, note: Option<Value>) -> Case {
    case_with(State { run, migration, note, cont: Cont::Answered, runs_after: 0, done: Vec::new() })
}

fn case_with(state: State) -> Case {
    let state = Arc::new(Mutex::new(state));
    let of_fake = Arc::clone(&state);
    let fake = Fake::start(move |listener| {
        loop {
            let mut session = Session::accept(listener);
            while let Some(command) = session.command() {
                if command["execute"] == "end of the fake" {
                    return;
                }
                let (name, arguments) = (command["execute"].as_str().unwrap(), &command["arguments"]);
                match of_fake.lock().unwrap().answer(name, arguments) {
                    Some(answer) => session.answer(&command, &answer),
                    None => break,
                }
            }
        }
    });
    let monitor = Monitor::new(Client::connect(&fake.path).unwrap());
    Case { state, fake, monitor }
}

impl State {
    fn answer(&mut self, command: &str, arguments: &Value) -> Option<Value> {
        match command {
            "query-status" => {
                if self.runs_after > 0 {
                    self.runs_after -= 1;
                    if self.runs_after == 0 {
                        self.run = "running";
                    }
                }
                return Some(json!({ "status": self.run, "running": self.run == "running" }));
            }
            "query-migrate" => return Some(json!({ "status": self.migration })),
            "qom-get" => {
                let data = self.note.as_ref().map(|note| json!(note.to_string()));
                return Some(data.unwrap_or_else(|| refusal("Device '/objects/sterna-note' not found")));
            }
            _ => {}
        }
        self.done.push(command.to_owned());
        match command {
            "migrate_cancel" => (self.migration, self.run) = ("cancelled", "running"),
            "cont" if self.cont == Cont::Refused => {
                return Some(refusal("Failed to get \"write\" lock"));
            }
            "cont" => self.run = "running",
            "stop" => self.run = "paused",
            "object-del" => self.note = None,
            "qom-set" => {
                let data = arguments["value"].as_str().unwrap();
                self.note = Some(serde_json::from_str(data).unwrap());
            }
            "migrate-set-parameters" => assert_eq!(arguments, &json!({ "downtime-limit": 123 })),
            _ => {}
        }
        (command != "cont" || self.cont != Cont::Lost).then(|| json!({}))
    }
}

impl Case {
    /// The result, and the commands that changed something.
    fn settles(self, owner: Owner) -> (Result<Settled, QemuError>, Vec<String>) {
        let settled = settle(&self.monitor, "tern", owner);
        let done = self.state.lock().unwrap().done.clone();
        let _ = self.monitor.client().execute("end of the fake", &json!({}));
        self.fake.finish();
        (settled, done)
    }
}

fn note(shall_run: bool) -> Option<Value> {
    let restore = json!({ "capabilities": {}, "parameters": { "DowntimeLimit": 123 } });
    Some(json!({ "guest": "tern", "shall_run": shall_run, "restore": restore }))
}

#[test]
fn a_guest_that_was_saved_and_not_given_away_runs_on_with_the_operators_settings() {
    let (settled, done) = case("postmigrate", "completed", note(true)).settles(Owner::ThisHost);
    assert_eq!(settled.unwrap(), Settled::Running);
    assert_eq!(done, ["cont", "announce-self", "migrate-set-parameters", "object-del"]);
}

#[test]
fn a_limit_of_the_guests_writes_ends_whatever_becomes_of_sterna() {
    for (run, migration) in [("running", "active"), ("postmigrate", "completed")] {
        let mut note = note(true);
        note.as_mut().unwrap()["limits_writes"] = json!(true);
        let (settled, done) = case(run, migration, note).settles(Owner::ThisHost);
        assert_eq!(settled.unwrap(), Settled::Running, "{migration}");
        assert!(done.iter().any(|command| command == "cancel-vcpu-dirty-limit"), "{done:?}");
    }
}

#[test]
fn a_migration_under_way_is_cancelled_in_each_of_its_stages() {
    for (run, migration) in [
        ("running", "setup"),
        ("running", "active"),
        ("finish-migrate", "pre-switchover"),
        ("finish-migrate", "device"),
    ] {
        let (settled, done) = case(run, migration, note(true)).settles(Owner::ThisHost);
        assert_eq!(settled.unwrap(), Settled::Running, "{migration}");
        assert_eq!(done, ["migrate_cancel", "migrate-set-parameters", "object-del"], "{migration}");
    }
}

#[test]
fn a_guest_that_qemu_is_about_to_resume_by_itself_is_waited_for() {
    let state = State {
        run: "finish-migrate",
        migration: "failed",
        note: note(true),
        cont: Cont::Refused,
        runs_after: 4,
        done: Vec::new(),
    };
    let (settled, done) = case_with(state).settles(Owner::ThisHost);
    assert_eq!(settled.unwrap(), Settled::Running);
    assert_eq!(done, ["migrate-set-parameters", "object-del"]);
}

#[test]
fn a_guest_that_its_operator_paused_stays_paused() {
    let (settled, done) = case("paused", "none", None).settles(Owner::ThisHost);
    assert_eq!((settled.unwrap(), done.len()), (Settled::Paused, 0));
    let (settled, done) = case("paused", "failed", note(false)).settles(Owner::ThisHost);
    assert_eq!(settled.unwrap(), Settled::Paused);
    assert_eq!(done, ["migrate-set-parameters", "object-del"]);
    // Saved, and not given away: without the note, it would count as given away for good.
    let saved = case("postmigrate", "completed", note(false));
    let state = Arc::clone(&saved.state);
    let (settled, done) = saved.settles(Owner::ThisHost);
    assert_eq!(settled.unwrap(), Settled::Paused);
    assert_eq!(done, ["migrate-set-parameters", "qom-set"], "it does not run, and the settings are back");
    let left = state.lock().unwrap().note.clone().unwrap();
    let nothing = json!({ "capabilities": {}, "parameters": {} });
    assert_eq!(left, json!({ "guest": "tern", "shall_run": false, "restore": nothing }));
    // The operator let it run.
    let (settled, done) = case("running", "completed", Some(left)).settles(Owner::ThisHost);
    assert_eq!((settled.unwrap(), done), (Settled::Running, vec!["object-del".to_owned()]));
}

#[test]
fn a_guest_that_another_program_moved_away_is_not_resumed_and_its_migration_not_cancelled() {
    let (settled, done) = case("postmigrate", "completed", None).settles(Owner::ThisHost);
    assert!(matches!(settled, Err(QemuError::State { state: RunState::PostMigrate })), "{settled:?}");
    assert_eq!(done, Vec::<String>::new());
    let (settled, done) = case("running", "active", None).settles(Owner::ThisHost);
    assert_eq!((settled.unwrap(), done.len()), (Settled::Running, 0));
}

#[test]
fn a_guest_that_may_run_elsewhere_is_not_resumed_and_is_stopped_if_it_runs() {
    let (settled, done) = case("postmigrate", "completed", note(true)).settles(Owner::Unknown);
    assert_eq!((settled.unwrap(), done.len()), (Settled::Paused, 0));
    let (settled, done) = case("running", "completed", note(true)).settles(Owner::Unknown);
    assert_eq!(settled.unwrap(), Settled::Paused);
    assert_eq!(done, ["stop"]);
}

#[test]
fn a_qemu_whose_guest_is_another_hosts_ends_unless_sterna_left_nothing_in_it() {
    let (settled, done) = case("postmigrate", "completed", note(true)).settles(Owner::OtherHost);
    assert_eq!(settled.unwrap(), Settled::Ended);
    assert_eq!(done, ["quit"]);
    // It waits for another guest.
    let (settled, done) = case("inmigrate", "none", note(true)).settles(Owner::OtherHost);
    assert_eq!((settled.unwrap(), done.len()), (Settled::Paused, 0));
    let (settled, done) = case("running", "none", None).settles(Owner::OtherHost);
    assert_eq!((settled.unwrap(), done.len()), (Settled::Running, 0));
}

#[test]
fn a_qemu_that_waits_for_a_guest_has_none() {
    let (settled, done) = case("inmigrate", "none", note(true)).settles(Owner::ThisHost);
    assert!(matches!(settled, Err(QemuError::State { state: RunState::InMigrate })), "{settled:?}");
    assert_eq!(done, Vec::<String>::new());
}

#[test]
fn a_guest_of_another_name_is_left_alone() {
    for owner in [Owner::ThisHost, Owner::Unknown, Owner::OtherHost] {
        let mut note = note(true);
        note.as_mut().unwrap()["guest"] = "plover".into();
        let (settled, done) = case("postmigrate", "completed", note).settles(owner);
        assert!(
            matches!(&settled, Err(QemuError::OtherGuest { found, .. }) if found == "plover"),
            "{settled:?}"
        );
        assert_eq!(done, Vec::<String>::new());
    }
}

#[test]
fn a_lost_answer_to_cont_is_no_refusal_and_a_refusal_leaves_the_guest_to_be_resumed_later() {
    let state = |cont| State {
        run: "postmigrate",
        migration: "completed",
        note: note(true),
        cont,
        runs_after: 0,
        done: Vec::new(),
    };
    let (settled, _) = case_with(state(Cont::Lost)).settles(Owner::ThisHost);
    assert_eq!(settled.unwrap(), Settled::Running);
    let (settled, done) = case_with(state(Cont::Refused)).settles(Owner::ThisHost);
    assert!(matches!(&settled, Err(QemuError::Qmp(QmpError::Refused { .. }))), "{settled:?}");
    assert!(!settled.unwrap_err().is_unknown());
    assert_eq!(done, ["cont"], "the note stays for the next attempt");
}
