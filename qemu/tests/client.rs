//! The client of QEMU's monitor, against a QEMU that follows a script.

mod common;

use std::env;
use std::io::Read;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::fake::{Fake, GREETING, Session, refusal};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};
use sterna_qemu::qmp::{Client, Event, Notice, QmpError};

/// Shorter than anything takes that is not to come.
const SHORT: Duration = Duration::from_millis(50);

#[test]
fn an_answer_and_a_refusal_come_back_to_their_caller() {
    let fake = Fake::answering(|command, arguments| match command {
        "add" => json!(arguments["a"].as_u64().unwrap() + 1),
        _ => refusal("not now"),
    });
    let client = Client::connect(&fake.path).unwrap();
    assert_eq!(client.execute("add", &json!({ "a": 1 })).unwrap(), 2);
    let refused = client.execute("other", &json!({})).unwrap_err();
    assert!(
        matches!(&refused, QmpError::Refused { description, .. } if description == "not now"),
        "{refused}"
    );
    assert!(!refused.is_unknown());
    let _ = client.execute("end of the fake", &json!({}));
    fake.finish();
}

#[test]
fn each_thread_gets_its_own_answer() {
    let fake = Fake::start(|listener| {
        let mut session = Session::accept(listener);
        let commands: Vec<Value> = (0..8).map(|_| session.command().unwrap()).collect();
        for command in commands.iter().rev() {
            session.answer(command, &command["arguments"]["n"]);
        }
    });
    let client = Client::connect(&fake.path).unwrap();
    thread::scope(|scope| {
        for n in 0..8 {
            let client = &client;
            scope.spawn(move || {
                assert_eq!(client.execute_within(PATIENCE, "say", &json!({ "n": n })).unwrap(), n);
            });
        }
    });
    fake.finish();
}

#[test]
fn events_come_to_a_subscriber_while_an_answer_is_awaited() {
    let fake = Fake::start(|listener| {
        let mut session = Session::accept(listener);
        let command = session.command().unwrap();
        session.say("{\"event\":\"MIGRATION\",\"data\":{\"status\":\"active\"},\"timestamp\":{}}\n");
        session.answer(&command, &json!({}));
        session.say("{\"event\":\"STOP\"}\n");
        let _ = session.command();
    });
    let client = Client::connect(&fake.path).unwrap();
    let events = client.subscribe();
    client.execute("migrate", &json!({})).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let event = |name: &str, data| Some(Notice::Event(Event { name: name.into(), data }));
    assert_eq!(events.next(deadline), event("MIGRATION", json!({ "status": "active" })));
    assert_eq!(events.next(deadline), event("STOP", Value::Null));
    drop(client);
    assert_eq!(events.next(deadline), Some(Notice::Gap));
    fake.finish();
}

#[test]
fn a_lost_answer_is_unknown_and_the_next_command_connects_anew() {
    let fake = Fake::start(|listener| {
        let mut session = Session::accept(listener);
        assert_eq!(session.command().unwrap()["execute"], "cont");
        session.say("{\"return\":");
        session.end();
        let mut session = Session::accept(listener);
        let command = session.command().unwrap();
        session.answer(&command, &json!({ "running": true }));
    });
    let client = Client::connect(&fake.path).unwrap();
    let lost = client.execute_within(PATIENCE, "cont", &json!({})).unwrap_err();
    assert!(matches!(lost, QmpError::Lost { .. }) && lost.is_unknown(), "{lost}");
    assert_eq!(client.execute("query-status", &json!({})).unwrap()["running"], true);
    fake.finish();
}

#[test]
fn the_end_of_a_connection_is_known_without_a_command() {
    let fake = Fake::start(|listener| {
        Session::accept(listener).end();
        let mut second = Session::accept(listener);
        let asked = second.command().unwrap();
        second.answer(&asked, &json!({}));
    });
    let client = Client::new(&fake.path);
    assert!(!client.is_connected());
    client.peer().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while client.is_connected() {
        assert!(Instant::now() < deadline, "the end is not seen");
        thread::sleep(Duration::from_millis(1));
    }
    client.execute("query-status", &json!({})).unwrap();
    fake.finish();
}

#[test]
fn a_command_to_a_qemu_that_has_gone_was_not_sent() {
    let fake = Fake::start(|listener| Session::accept(listener).end());
    let client = Client::connect(&fake.path).unwrap();
    std::fs::remove_file(&fake.path).unwrap();
    fake.finish();
    loop {
        let error = client.execute("cont", &json!({})).unwrap_err();
        // Until the client has noticed the end, it is doubtful what became of the command.
        if !error.is_unknown() {
            assert!(matches!(error, QmpError::Unsent { .. } | QmpError::Connect { .. }), "{error}");
            break;
        }
    }
}

#[test]
fn a_late_answer_is_unknown_and_is_not_taken_for_that_of_another_command() {
    let fake = Fake::start(|listener| {
        let mut session = Session::accept(listener);
        let [first, second] = [(); 2].map(|()| session.command().unwrap());
        session.answer(&first, &json!("first"));
        let third = session.command().unwrap();
        session.answer(&second, &json!("second"));
        session.answer(&third, &json!("third"));
    });
    let client = Client::connect(&fake.path).unwrap();
    for (command, limit) in [("first", SHORT), ("second", SHORT * 10)] {
        let late = client.execute_within(limit, command, &json!({})).unwrap_err();
        assert!(matches!(late, QmpError::Late { .. }) && late.is_unknown(), "{late}");
    }
    assert_eq!(client.execute_within(PATIENCE, "third", &json!({})).unwrap(), "third");
    fake.finish();
}

#[test]
fn what_is_no_qemu_is_refused_and_says_so() {
    for said in ["{\"return\":{},\"id\":0}\n", "HTTP/1.1 400 Bad Request\r\n", "", &"x".repeat(5 << 20)] {
        let said = said.to_owned();
        let fake = Fake::start(move |listener| {
            let mut session = Session::accept_silently(listener);
            session.say(&said);
            session.end();
        });
        let error = Client::connect(&fake.path).unwrap_err();
        assert!(matches!(error, QmpError::NotQmp { .. }), "{error}");
        fake.finish();
    }
}

#[test]
fn lines_that_qemu_never_sends_end_the_connection() {
    for said in [GREETING, "{\"return\":{},\"id\":700}\n", "{\"return\":{}}\n", "nonsense\n"] {
        let fake = Fake::start(move |listener| {
            let mut session = Session::accept(listener);
            let _ = session.command();
            session.say(said);
            assert_eq!(session.command(), None);
        });
        let client = Client::connect(&fake.path).unwrap();
        let error = client.execute_within(PATIENCE, "query-status", &json!({})).unwrap_err();
        assert!(matches!(error, QmpError::Lost { .. }), "{error}");
        fake.finish();
    }
}

#[test]
fn a_monitor_that_serves_another_client_is_busy() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let error = Client::new(&path).execute_within(SHORT, "query-status", &json!({})).unwrap_err();
    assert!(matches!(error, QmpError::Busy { .. }), "{error}");
    // Nor does a full queue keep it waiting.
    rustix::net::listen(&listener, 0).unwrap();
    let _waiting: Vec<_> =
        (0..3).map(|_| Client::new(&path).execute_within(SHORT, "x", &json!({}))).collect();
    let error = Client::new(&path).execute_within(SHORT, "query-status", &json!({})).unwrap_err();
    assert!(matches!(error, QmpError::Busy { .. }), "{error}");
}

#[test]
fn a_descriptor_arrives_with_its_command() {
    let fake = Fake::start(|listener| {
        let session = &mut Session::accept(listener);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 1024];
        let buffers = &mut [std::io::IoSliceMut::new(&mut bytes)];
        let received = recvmsg(&session.stream, buffers, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
        let descriptor = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        let command: Value = serde_json::from_slice(&bytes[..received.bytes]).unwrap();
        assert_eq!(command["execute"], "getfd");
        assert_eq!(command["arguments"]["fdname"], "stream");
        let mut text = String::new();
        std::fs::File::from(descriptor.unwrap()).read_to_string(&mut text).unwrap();
        session.answer(&command, &json!({}));
        assert_eq!(text, "through the pipe");
    });
    let client = Client::connect(&fake.path).unwrap();
    let (reads, mut writes) = std::io::pipe().unwrap();
    std::io::Write::write_all(&mut writes, b"through the pipe").unwrap();
    drop(writes);
    client.getfd("stream", reads.as_fd()).unwrap();
    fake.finish();
}

#[test]
fn a_condition_is_awaited_until_its_deadline_only() {
    let mut asked = 0;
    let fake = Fake::answering(move |_, _| {
        asked += 1;
        json!(asked)
    });
    let client = Client::connect(&fake.path).unwrap();
    let ask = |client: &Client, enough: u64| -> Result<Option<u64>, QmpError> {
        let count = client.execute("count", &json!({}))?.as_u64().unwrap();
        Ok((count >= enough).then_some(count))
    };
    let found = client.wait_until(Instant::now() + PATIENCE, |client| ask(client, 3)).unwrap();
    assert_eq!(found, Some(3));
    let found = client.wait_until(Instant::now() + SHORT, |client| ask(client, u64::MAX)).unwrap();
    assert_eq!(found, None);
    let _ = client.execute("end of the fake", &json!({}));
    fake.finish();
}

#[test]
fn another_process_at_the_socket_is_not_taken_for_the_same_qemu() {
    let fake = Fake::start(|listener| Session::accept(listener).end());
    let client = Client::connect(&fake.path).unwrap();
    std::fs::remove_file(&fake.path).unwrap();
    let mut successor = Command::new(env::current_exe().unwrap())
        .args(["--exact", "successor", "--nocapture"])
        .env("STERNA_TEST_SUCCESSOR", &fake.path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    let error = loop {
        match client.execute_within(PATIENCE, "query-status", &json!({})) {
            Err(QmpError::Connect { .. } | QmpError::Lost { .. } | QmpError::Unsent { .. })
                if Instant::now() < deadline =>
            {
                thread::sleep(Duration::from_millis(10));
            }
            other => break other.unwrap_err(),
        }
    };
    drop(successor.stdin.take());
    successor.wait().unwrap();
    let now = i32::try_from(successor.id()).unwrap();
    assert!(matches!(error, QmpError::OtherProcess { now: found, .. } if found == now), "{error}");
    fake.finish();
}

/// The other process of the test above; on its own, it does nothing.
#[test]
fn successor() {
    let Some(path) = env::var_os("STERNA_TEST_SUCCESSOR") else { return };
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        loop {
            let _ = Session::accept(&listener).command();
        }
    });
    // Until the test closes it.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}
