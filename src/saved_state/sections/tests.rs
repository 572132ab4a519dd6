use std::io::{BufReader, Read, Write};

use proptest::prelude::*;

use super::*;

fn written(sections: &[(&str, &[u8])], piece: usize) -> Vec<u8> {
    let mut state = Vec::new();
    let mut writer = StateWriter::new(&mut state);
    for (name, bytes) in sections {
        let mut section = writer.section(name).unwrap();
        bytes.chunks(piece).for_each(|piece| section.write_all(piece).unwrap());
    }
    let len = writer.finish().unwrap();
    assert_eq!(len, state.len() as u64);
    state
}

fn read_all(state: &[u8], buffer: usize) -> Result<Vec<(String, Vec<u8>)>, SectionError> {
    let mut from = BufReader::with_capacity(buffer, state);
    let mut reader = StateReader::new(&mut from);
    let mut sections = Vec::new();
    while let Some(mut section) = reader.next_section()? {
        let mut bytes = Vec::new();
        section.read_to_end(&mut bytes)?;
        sections.push((section.name().to_owned(), bytes));
    }
    reader.finish()?;
    Ok(sections)
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| (at * at / 251).to_le_bytes()[0]).collect()
}

#[test]
fn sections_are_read_as_they_were_written_in_whatever_pieces() {
    let long = pattern(2 * CHUNK_MAX + 5);
    let sections: [(&str, &[u8]); 4] = [("cpu", b"abc"), ("empty", b""), ("gpu", &long), ("cpu", b"again")];
    for piece in [7777, 16 << 10, 64 << 10, long.len()] {
        let state = written(&sections, piece);
        // The lengths cost little: small writes are collected.
        assert!(state.len() < long.len() + long.len() / 1000 + 100, "{} bytes", state.len());
        for buffer in [1, 4096, 256 << 10] {
            let read = read_all(&state, buffer).unwrap();
            assert!(read.iter().map(|(name, bytes)| (&**name, &**bytes)).eq(sections), "{piece}, {buffer}");
        }
    }
    assert!(read_all(&written(&[], 1), 10).unwrap().is_empty());
}

#[test]
fn a_section_that_is_missing_unknown_or_of_another_length_is_named() {
    let state = written(&[("cpu", b"abc"), ("gpu\n", b"defg")], 10);
    let error = |read: &dyn Fn(&mut StateReader<'_>) -> Result<(), SectionError>| {
        let mut from = &state[..];
        let mut reader = StateReader::new(&mut from);
        read(&mut reader).and_then(|()| reader.finish()).unwrap_err().to_string()
    };
    let skip_cpu = |state: &mut StateReader<'_>| state.section("cpu")?.skip();
    let missing = error(&|state| skip_cpu(state).and_then(|()| state.section("disk").map(drop)));
    assert!(missing.contains(r#"has section "gpu\n" where section "disk" was due"#), "{missing}");
    let unknown = error(&|state| {
        skip_cpu(state)?;
        Err(state.next_section()?.map_or(SectionError::CutShort, |section| section.unknown()))
    });
    assert!(unknown.contains(r#"section "gpu\n", which this VMM does not know"#), "{unknown}");
    let left =
        error(&|state| skip_cpu(state).and_then(|()| Ok(state.section("gpu\n")?.read_exact(&mut [0; 3])?)));
    assert!(left.contains(r#"section "gpu\n" of the saved state was not read to its end"#), "{left}");
    let not_asked_for = error(&skip_cpu);
    assert!(not_asked_for.contains(r#""gpu\n" of the saved state was not read"#), "{not_asked_for}");
    let at_end = error(&|state| {
        skip_cpu(state)?;
        state.section("gpu\n")?.skip()?;
        state.section("disk").map(drop)
    });
    assert!(at_end.contains(r#"its end where section "disk" was due"#), "{at_end}");
    let too_much = error(&|state| Ok(state.section("cpu")?.read_exact(&mut [0; 4])?));
    assert!(too_much.contains("failed to fill whole buffer"), "{too_much}");
}

#[test]
fn a_section_that_was_read_to_its_last_byte_is_over_without_another_look() {
    let state = written(&[("cpu", b"abc"), ("gpu", b"d")], 10);
    let mut from = &state[..];
    let mut reader = StateReader::new(&mut from);
    reader.section("cpu").unwrap().read_exact(&mut [0; 3]).unwrap();
    reader.section("gpu").unwrap().read_exact(&mut [0; 1]).unwrap();
    assert_eq!(reader.bytes_read(), state.len() as u64 - 5);
    reader.finish().unwrap();
}

#[test]
fn a_name_that_could_not_be_read_is_not_written() {
    let mut state = Vec::new();
    let mut writer = StateWriter::new(&mut state);
    for name in ["", &"x".repeat(SECTION_NAME_MAX + 1)] {
        assert_eq!(writer.section(name).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
    assert!(writer.section(&"x".repeat(SECTION_NAME_MAX)).is_ok());
}

#[test]
fn lengths_and_names_of_a_peer_are_checked_before_they_are_believed() {
    let chunk = |len: u32| [&[1, b'a'][..], &len.to_le_bytes(), &[0; 9]].concat();
    for (state, says) in [
        (vec![], "cut short"),
        (vec![65; 100], "name is too long"),
        (vec![2, 0xff, 0xfe], "no UTF-8"),
        (vec![2, b'a'], "cut short"),
        (chunk(u32::MAX), "chunk is too long"),
        (chunk(1 << 20), "cut short"),
        (vec![0, 0], "bytes follow its end"),
    ] {
        let error = read_all(&state, 100).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let state = written(&[("cpu", b"abc")], 10);
    for len in 0..state.len() {
        assert!(matches!(read_all(&state[..len], 3), Err(error) if error.to_string().contains("cut short")));
    }
}

proptest! {
    #[test]
    fn no_bytes_of_a_peer_make_a_reader_panic_or_give_more_than_they_are(
        state in prop::collection::vec(prop_oneof![Just(0u8), Just(1), Just(3), any::<u8>()], 0..200),
        buffer in 1..50usize,
    ) {
        if let Ok(sections) = read_all(&state, buffer) {
            let held: usize = sections.iter().map(|(name, bytes)| name.len() + bytes.len()).sum();
            prop_assert!(held < state.len());
        }
    }
}
