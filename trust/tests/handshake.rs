//! Two hosts, and strangers, on real connections.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustls::{ClientConfig, ClientConnection, Stream};
use sterna_trust::{Fingerprint, Peer, Rights, TlsError, TlsStream, TrustStore, accept, connect};
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(60);

/// A host with a key and a list of its own.
struct Host {
    store: TrustStore,
    _folder: TempDir,
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { store: TrustStore::at(&folder.path().join("trust")), _folder: folder }
    }

    fn key(&self) -> Fingerprint {
        self.store.host_key().unwrap().fingerprint()
    }

    fn trusts(&self, name: &str, key: Fingerprint) {
        self.store.add(Peer { name: name.into(), fingerprint: key, rights: Rights::all() }).unwrap();
    }
}

/// Two hosts that trust each other.
fn friends() -> (Host, Host) {
    let (tern, gull) = (Host::new(), Host::new());
    tern.trusts("gull", gull.key());
    gull.trusts("tern", tern.key());
    (tern, gull)
}

fn connections() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client, listener.accept().unwrap().0)
}

type End = Result<(TlsStream, Peer), TlsError>;

/// Both ends of a connection from `from` to `to`. A client learns of a refusal when it reads.
fn meet(from: &Host, to: &Host, expected: Option<Fingerprint>) -> (End, End) {
    let (client, server) = connections();
    thread::scope(|scope| {
        let accepting = scope.spawn(|| {
            let (session, peer) = accept(&server, &to.store, LIMIT)?;
            let mut stream = TlsStream::new(server, session);
            stream.write_all(b"welcome").map_err(TlsError::Io)?;
            Ok((stream, peer))
        });
        let connecting = connect(&client, &from.store, expected, LIMIT).and_then(|(session, peer)| {
            let mut stream = TlsStream::new(client, session);
            match stream.read_exact(&mut [0; 7]) {
                Ok(()) => Ok((stream, peer)),
                Err(error) => Err(error.downcast::<TlsError>().unwrap_or_else(TlsError::Io)),
            }
        });
        (connecting, accepting.join().unwrap())
    })
}

#[test]
fn hosts_that_trust_each_other_meet_and_know_each_other_by_name() {
    let (tern, gull) = friends();
    let (at_tern, at_gull) = meet(&tern, &gull, Some(gull.key()));
    assert_eq!(at_tern.unwrap().1.name, "gull");
    let (mut stream, peer) = at_gull.unwrap();
    assert_eq!((peer.name.as_str(), peer.fingerprint), ("tern", tern.key()));
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the other end is gone");
}

#[test]
fn a_host_that_is_not_trusted_is_refused_and_both_ends_name_its_key() {
    let (tern, gull) = (Host::new(), Host::new());
    tern.trusts("gull", gull.key());
    let (at_tern, at_gull) = meet(&tern, &gull, None);
    let error = at_tern.unwrap_err();
    assert!(
        matches!(error, TlsError::NotTrustedThere { fingerprint } if fingerprint == tern.key()),
        "{error}"
    );
    let error = at_gull.unwrap_err();
    assert!(matches!(error, TlsError::NotTrusted { fingerprint } if fingerprint == tern.key()), "{error}");
    let text = error.to_string();
    assert!(text.contains(&format!("`sterna trust add NAME {}`", tern.key())), "{text}");
}

#[test]
fn a_host_that_does_not_trust_the_one_it_reached_goes_no_further() {
    let (tern, gull) = (Host::new(), Host::new());
    gull.trusts("tern", tern.key());
    let (at_tern, at_gull) = meet(&tern, &gull, None);
    let error = at_tern.unwrap_err();
    assert!(matches!(error, TlsError::NotTrusted { fingerprint } if fingerprint == gull.key()), "{error}");
    let error = at_gull.unwrap_err();
    assert!(
        matches!(error, TlsError::NotTrustedThere { fingerprint } if fingerprint == gull.key()),
        "{error}"
    );
}

#[test]
fn a_trusted_host_in_the_place_of_another_is_refused() {
    let (tern, gull) = friends();
    let skua = Host::new();
    tern.trusts("skua", skua.key());
    let (at_tern, _) = meet(&tern, &gull, Some(skua.key()));
    let error = at_tern.unwrap_err();
    assert!(matches!(&error, TlsError::OtherHost { name, .. } if name == "gull"), "{error}");
    // The old key and the new one of a host that rotates.
    tern.trusts("gull", Fingerprint([9; 32]));
    meet(&tern, &gull, Some(Fingerprint([9; 32]))).0.unwrap();
}

#[test]
fn a_change_of_key_or_list_counts_from_the_next_connection_on() {
    let (tern, gull) = friends();
    meet(&tern, &gull, None).0.unwrap();
    let old = tern.key();
    tern.store.rotate().unwrap();
    assert!(matches!(meet(&tern, &gull, None).1, Err(TlsError::NotTrusted { .. })));
    gull.trusts("tern", tern.key());
    meet(&tern, &gull, None).0.unwrap();
    gull.store.remove("tern", None).unwrap();
    assert!(matches!(meet(&tern, &gull, None).1, Err(TlsError::NotTrusted { .. })));
    gull.trusts("tern", old);
    assert!(matches!(meet(&tern, &gull, None).1, Err(TlsError::NotTrusted { .. })));
}

/// What a host says to a stranger, and what the stranger reads in the end.
fn stranger(host: &Host, limit: Duration, act: impl FnOnce(&mut TcpStream)) -> (TlsError, Vec<u8>) {
    let (mut client, server) = connections();
    thread::scope(|scope| {
        let accepting = scope.spawn(|| {
            let error = accept(&server, &host.store, limit).unwrap_err();
            drop(server);
            error
        });
        act(&mut client);
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer);
        (accepting.join().unwrap(), answer)
    })
}

#[test]
fn bytes_that_are_not_tls_are_refused() {
    let host = Host::new();
    let (error, answer) = stranger(&host, LIMIT, |stream| stream.write_all(&[b'?'; 64]).unwrap());
    assert!(matches!(error, TlsError::NotTls), "{error}");
    assert!(answer.is_empty() || answer[0] == 21, "no more than an alert");
}

#[test]
fn a_client_that_speaks_no_tls_1_3_is_refused_with_the_version() {
    // A ClientHello of TLS 1.2 with one cipher; its extensions are algorithms of signatures and a curve.
    let extensions = [0, 16, 0, 13, 0, 4, 0, 2, 4, 3, 0, 10, 0, 4, 0, 2, 0, 29];
    let body = [&[3, 3][..], &[7; 32], &[0], &[0, 2, 0xc0, 0x2f], &[1, 0], &extensions].concat();
    let len = u8::try_from(body.len()).unwrap();
    let hello = [&[22, 3, 1, 0, len + 4, 1, 0, 0, len][..], &body].concat();
    let (error, answer) = stranger(&Host::new(), LIMIT, |stream| stream.write_all(&hello).unwrap());
    assert!(matches!(error, TlsError::Version), "{error}");
    assert_eq!((answer[0], answer[6]), (21, 70), "the alert `protocol_version`");
}

#[test]
fn a_client_without_a_key_is_refused() {
    let (_, gull) = friends();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let mut client = ClientConnection::new(Arc::new(config), "sterna".try_into().unwrap()).unwrap();
    let (error, _) = stranger(&gull, LIMIT, |stream| {
        let _ = Stream::new(&mut client, stream).write_all(b"hello");
    });
    assert!(matches!(error, TlsError::NoKey), "{error:?}");
}

#[test]
fn half_a_handshake_is_given_up_in_time_however_it_ends() {
    let (tern, gull) = friends();
    // The first bytes of a sound handshake.
    let (client, mut server) = connections();
    let hello = thread::scope(|scope| {
        scope.spawn(|| connect(&client, &tern.store, None, Duration::from_millis(200)));
        let mut hello = vec![0; 4096];
        let count = server.read(&mut hello).unwrap();
        hello.truncate(count);
        hello
    });
    let (error, _) = stranger(&gull, LIMIT, |stream| {
        stream.write_all(&hello[..hello.len() / 2]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    });
    assert!(matches!(error, TlsError::Closed), "{error}");
    let began = Instant::now();
    let limit = Duration::from_millis(300);
    let (error, _) = stranger(&gull, limit, |stream| {
        for &byte in &hello[..hello.len() - 1] {
            if stream.write_all(&[byte]).is_err() || began.elapsed() > 4 * limit {
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
    });
    assert!(matches!(error, TlsError::Timeout { .. }), "{error}");
    // What was recorded of one handshake opens no other.
    let (error, _) = stranger(&gull, LIMIT, |stream| {
        stream.write_all(&[&hello[..], &hello[5..]].concat()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    });
    assert!(!matches!(error, TlsError::Timeout { .. }), "{error}");
}

#[test]
fn much_passes_in_both_directions_and_nothing_of_it_in_plain_text() {
    let (tern, gull) = friends();
    let (at_tern, at_gull) = meet(&tern, &gull, None);
    let ((mut at_tern, _), (mut at_gull, _)) = (at_tern.unwrap(), at_gull.unwrap());
    let bytes: Vec<u8> = (0..8_000_000u32).map(|number| (number % 251) as u8).collect();
    thread::scope(|scope| {
        let bytes = &bytes;
        scope.spawn(move || {
            // Pieces of many lengths.
            let mut rest = &bytes[..];
            for len in (1..).map(|number| number * 997 % 400_000) {
                let (piece, after) = rest.split_at(len.min(rest.len()));
                at_tern.write_all(piece).unwrap();
                rest = after;
                if rest.is_empty() {
                    break;
                }
            }
            let mut back = vec![0; 100];
            at_tern.read_exact(&mut back).unwrap();
            assert_eq!(back, bytes[..100]);
        });
        let mut came = vec![0; bytes.len()];
        at_gull.read_exact(&mut came).unwrap();
        assert!(came == *bytes);
        at_gull.write_all(&came[..100]).unwrap();
    });
}

#[test]
fn a_record_that_was_changed_on_its_way_ends_the_session() {
    let (tern, gull) = friends();
    let (at_tern, at_gull) = meet(&tern, &gull, None);
    let (_, mut sending) = at_tern.unwrap().0.into_parts();
    let (_, mut receiving) = at_gull.unwrap().0.into_parts();
    let records = sending.encrypt(b"pay 1").unwrap();
    assert!(!records.windows(5).any(|window| window == b"pay 1"));
    receiving.feed(&records).unwrap();
    let mut plain = [0; 9];
    assert_eq!((receiving.read(&mut plain), &plain[..5]), (5, &b"pay 1"[..]));
    assert!(matches!(receiving.feed(&records), Err(TlsError::Changed)), "a record counts once");
}
