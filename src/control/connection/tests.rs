use std::net::TcpListener;

use super::*;
use crate::control::KEEPALIVE_INTERVAL;
use crate::wire::{AttemptId, DIGESTS_MAX, StateFrame};

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (ours, listener.accept().unwrap().0)
}

fn start(stream: TcpStream, keepalive: Duration) -> io::Result<Arc<Connection>> {
    Connection::start(ProtectedStream::Plain(stream), keepalive)
}

fn frame(message: &Message) -> Vec<u8> {
    let body = message.encode().unwrap();
    let head = FrameHead::new(message.kind(), &body).unwrap();
    [head.as_bytes(), &body].concat()
}

#[test]
fn a_peer_that_says_nothing_ends_the_wait_and_the_lanes() {
    let (ours, _theirs) = pair();
    let (mut lane, _its_other_end) = pair();
    let connection = start(ours, Duration::from_millis(20)).unwrap();
    connection.shut_with(lane.try_clone().unwrap());
    assert!(matches!(connection.receive("anything", None), Err(ControlError::Silent { .. })));
    assert!(matches!(connection.check(), Err(ControlError::Silent { .. })));
    assert_eq!(lane.read(&mut [0]).unwrap(), 0, "it was shut down");
    let (mut late, _its_other_end) = pair();
    connection.shut_with(late.try_clone().unwrap());
    assert_eq!(late.read(&mut [0]).unwrap(), 0, "so is one that is made after");
    connection.leave();
}

#[test]
fn two_that_have_nothing_to_say_hear_each_other_all_the_same() {
    let keepalive = Duration::from_millis(200);
    let (ours, theirs) = pair();
    let (connection, other) = (start(ours, keepalive).unwrap(), start(theirs, keepalive).unwrap());
    let deadline = Instant::now() + keepalive * (KEEPALIVES_MISSED_MAX + KEEPALIVES_MISSED_MAX / 2);
    assert_eq!(connection.receive("nothing", Some(deadline)).unwrap(), None);
    other.send(&frame(&Message::Go(AttemptId([1; 16]))), "Go").unwrap();
    other.leave();
    assert_eq!(connection.receive("GO", None).unwrap(), Some(Message::Go(AttemptId([1; 16]))));
    assert!(matches!(connection.receive("more", None), Err(ControlError::Closed("more"))));
    connection.leave();
}

#[test]
fn an_interrupt_ends_every_wait_and_leaves_room_for_a_word() {
    let ((ours, theirs), (mut lane, _its_other_end)) = (pair(), pair());
    let (connection, other) =
        (start(ours, KEEPALIVE_INTERVAL).unwrap(), start(theirs, KEEPALIVE_INTERVAL).unwrap());
    connection.shut_with(lane.try_clone().unwrap());
    thread::scope(|scope| {
        let waiting = scope.spawn(|| connection.receive("anything", None));
        connection.interrupt();
        assert!(matches!(waiting.join().unwrap(), Err(ControlError::Interrupted)));
    });
    assert_eq!(lane.read(&mut [0]).unwrap(), 0, "it was shut down");
    connection.send(&frame(&Message::Go(AttemptId([1; 16]))), "Go").unwrap();
    assert_eq!(other.receive("GO", None).unwrap(), Some(Message::Go(AttemptId([1; 16]))));
    connection.leave();
    other.leave();
}

#[test]
fn an_interrupt_ends_the_sending_of_what_is_not_taken() {
    let (ours, _theirs) = pair();
    let connection = start(ours, 2 * KEEPALIVE_INTERVAL).unwrap();
    thread::scope(|scope| {
        let sending = scope.spawn(|| connection.send(&vec![0; 64 << 20], "a flood"));
        thread::sleep(Duration::from_millis(50));
        connection.interrupt();
        assert!(matches!(sending.join().unwrap(), Err(ControlError::Interrupted)));
    });
    assert!(connection.send(b"more", "more").is_err(), "the peer could not find its beginning");
    connection.leave();
}

#[test]
fn after_a_part_of_the_state_that_was_damaged_nothing_is_believed() {
    let (ours, mut theirs) = pair();
    let connection = start(ours, KEEPALIVE_INTERVAL).unwrap();
    let part = |offset| frame(&Message::State(StateFrame { offset, bytes: vec![7; 9] }));
    let mut damaged = part(9);
    damaged[FRAME_HEAD_LEN + 3] ^= 1;
    theirs.write_all(&[part(0), damaged, part(18)].concat()).unwrap();
    assert!(matches!(connection.receive("state", None), Ok(Some(Message::State(_)))));
    for _ in 0..2 {
        let error = connection.receive("state", None).unwrap_err();
        assert!(matches!(error, ControlError::Wire(WireError::Damaged)), "{error}");
    }
    theirs.write_all(&frame(&Message::Go(AttemptId([1; 16])))).unwrap();
    let error = connection.receive("GO", Some(Instant::now() + KEEPALIVE_INTERVAL / 10)).unwrap_err();
    assert!(matches!(error, ControlError::Wire(WireError::Damaged)), "{error}");
    connection.leave();
}

#[test]
fn memory_that_was_made_ready_is_what_a_state_arrives_in() {
    let ((ours, mut theirs), len) = (pair(), 3 * STATE_FRAME_MAX as u64 - 1);
    let connection = start(ours, KEEPALIVE_INTERVAL).unwrap();
    (0..connection.state_buffers_missing(len)).for_each(|_| assert!(connection.add_state_buffer()));
    assert_eq!(connection.state_buffers_missing(len), 0);
    let ready: Vec<_> = connection.state_buffers().iter().map(Vec::as_ptr).collect();
    assert_eq!(ready.len(), 3);
    for offset in 0..4 {
        let bytes = vec![7; STATE_FRAME_MAX >> offset];
        theirs.write_all(&frame(&Message::State(StateFrame { offset, bytes }))).unwrap();
        let Ok(Some(Message::State(part))) = connection.receive("state", None) else { panic!("no state") };
        assert_eq!((part.offset, part.bytes.len()), (offset, STATE_FRAME_MAX >> offset));
        assert!(part.bytes.iter().all(|&byte| byte == 7));
        assert_eq!(ready.contains(&part.bytes.as_ptr()), offset < 3);
        std::mem::forget(part);
    }
    connection.leave();
    assert!(!connection.add_state_buffer(), "nothing more comes");
}

#[test]
fn a_flood_waits_in_the_connection_and_is_no_silence() {
    const DIGESTS: usize = 128;
    let (ours, mut theirs) = pair();
    let connection = start(ours, Duration::from_millis(50)).unwrap();
    let digests = frame(&Message::Digests(vec![[7; 32]; DIGESTS_MAX]));
    theirs.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    let sent = (0..DIGESTS).take_while(|_| theirs.write_all(&digests).is_ok()).count();
    assert!(sent < DIGESTS, "64 MiB are more than the inbox and the buffers of a connection hold");
    let waiting = connection.inbox().bytes;
    assert!(waiting <= INBOX_BYTES_MAX + 2 * digests.len(), "{waiting}");
    assert!(connection.check().is_ok());
    for _ in 0..sent {
        assert!(matches!(connection.receive("digests", None), Ok(Some(Message::Digests(_)))));
    }
    connection.leave();
}
