//! Encoding and decoding of messages. Everything from a peer is checked against its bounds before it is
//! believed.

use serde::de::DeserializeOwned;

use super::WireError;
use super::message::{
    DIGESTS_MAX, FILE_NAME_MAX, IMAGE_MAX, ImageContent, ImageOffer, LANE_BODY_MAX, LANES_MAX, LaneOffer,
    Message, NAME_MAX, SCHEME_MAX, STATE_FRAME_MAX, StateFrame, TRANSPORT_BODY_MAX,
};
use super::text::{escape, is_shown_as_it_is};
use crate::memory::PAGE_BYTES;

/// The longest opaque description of a machine, in bytes.
const DETAILS_MAX: usize = 256 << 10;
/// The longest text of a reason, in bytes.
const TEXT_MAX: usize = 4 << 10;

impl Message {
    /// The message's kind in a frame's head.
    #[must_use]
    pub fn kind(&self) -> u16 {
        match self {
            Self::Hello(_) => 1,
            Self::Ready(..) => 2,
            Self::Refused(_) => 3,
            Self::Transport(_) => Self::TRANSPORT_KIND,
            Self::RoundClosed(_) => 6,
            Self::Digests(_) => 7,
            Self::Final(_) => 8,
            Self::Prepared(..) => 9,
            Self::Go(_) => 10,
            Self::Running(_) => 11,
            Self::Alive(..) => 12,
            Self::Abort(..) => 13,
            Self::OfferImage(_) => 14,
            Self::Stored(_) => 15,
            Self::Beat => 17,
            Self::LanesFailed(..) => 18,
            Self::Ask(_) => 19,
            Self::Outcome(..) => 20,
            Self::Done(_) => 21,
            Self::BlockDigests(_) => 22,
            Self::Checked(_) => 23,
            Self::State(_) => Self::STATE_KIND,
        }
    }

    /// The kind of [`Message::Transport`].
    const TRANSPORT_KIND: u16 = 4;

    /// The kind of [`Message::State`].
    pub(crate) const STATE_KIND: u16 = 24;

    /// The message's name, for errors and logs.
    #[must_use]
    pub fn name(&self) -> &'static str {
        kind_bound(self.kind()).map_or("message", |(name, _)| name)
    }

    /// The longest body, in bytes, that a message of this kind may have.
    ///
    /// # Errors
    /// [`WireError::Kind`] for a kind that does not exist.
    pub fn body_max(kind: u16) -> Result<usize, WireError> {
        kind_bound(kind).map(|(_, max)| max).ok_or(WireError::Kind(kind))
    }

    /// The message's body.
    ///
    /// # Errors
    /// [`WireError::TooLong`] if it is longer than its kind may be.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let (what, max) = kind_bound(self.kind()).ok_or(WireError::Kind(self.kind()))?;
        let body = match self {
            Self::Hello(body) => postcard::to_stdvec(body),
            Self::Ready(lanes, costs) => postcard::to_stdvec(&(lanes, costs)),
            Self::Refused(body) => postcard::to_stdvec(body),
            Self::Transport(body) => Ok(body.clone()),
            Self::RoundClosed(body) => postcard::to_stdvec(body),
            Self::Digests(body) => postcard::to_stdvec(body),
            Self::Final(body) => postcard::to_stdvec(body),
            Self::Prepared(attempt_id, completion) => postcard::to_stdvec(&(attempt_id, completion)),
            Self::Go(body)
            | Self::Running(body)
            | Self::Stored(body)
            | Self::Ask(body)
            | Self::Done(body) => postcard::to_stdvec(body),
            Self::Outcome(attempt_id, outcome) => postcard::to_stdvec(&(attempt_id, outcome)),
            Self::Alive(attempt_id, count, after_us) => postcard::to_stdvec(&(attempt_id, count, after_us)),
            Self::Abort(attempt_id, text) | Self::LanesFailed(attempt_id, text) => {
                let end = (0..=TEXT_MAX.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
                postcard::to_stdvec(&(attempt_id, &text[..end.unwrap_or(0)]))
            }
            Self::OfferImage(body) => postcard::to_stdvec(body),
            Self::Beat => Ok(Vec::new()),
            Self::BlockDigests(body) => postcard::to_stdvec(body),
            Self::Checked(body) => postcard::to_stdvec(body),
            Self::State(StateFrame { offset, bytes }) => Ok([bytes, &offset.to_le_bytes()[..]].concat()),
        }
        .map_err(|_| WireError::Malformed(what))?;
        if body.len() > max {
            return Err(WireError::TooLong { what, len: body.len(), max });
        }
        Ok(body)
    }

    /// As [`decode`](Self::decode), without copying long content.
    ///
    /// # Errors
    /// The same.
    pub(crate) fn decode_owned(kind: u16, body: Vec<u8>) -> Result<Self, WireError> {
        match kind {
            Self::STATE_KIND => StateFrame::decode(body).map(Self::State),
            Self::TRANSPORT_KIND => Self::of_transport(body),
            _ => Self::decode(kind, &body),
        }
    }

    fn of_transport(body: Vec<u8>) -> Result<Self, WireError> {
        bound("a request of a transport", body.len(), TRANSPORT_BODY_MAX)?;
        Ok(Self::Transport(body))
    }

    /// Reads a message of this kind from its body, and checks every bound that the body's length does not
    /// imply.
    ///
    /// # Errors
    /// [`WireError`] for anything that this version would not send.
    pub fn decode(kind: u16, body: &[u8]) -> Result<Self, WireError> {
        let (what, max) = kind_bound(kind).ok_or(WireError::Kind(kind))?;
        if body.len() > max {
            return Err(WireError::TooLong { what, len: body.len(), max });
        }
        let message = match kind {
            1 => Self::Hello(parse(what, body)?),
            2 => parse(what, body).map(|(lanes, costs)| Self::Ready(lanes, costs))?,
            3 => Self::Refused(parse(what, body)?),
            Self::TRANSPORT_KIND => Self::of_transport(body.to_vec())?,
            6 => Self::RoundClosed(parse(what, body)?),
            7 => Self::Digests(parse(what, body)?),
            8 => Self::Final(parse(what, body)?),
            9 => parse(what, body).map(|(attempt_id, completion)| Self::Prepared(attempt_id, completion))?,
            10 => Self::Go(parse(what, body)?),
            11 => Self::Running(parse(what, body)?),
            12 => parse(what, body)
                .map(|(attempt_id, count, after_us)| Self::Alive(attempt_id, count, after_us))?,
            13 => parse(what, body)
                .map(|(attempt_id, text): (_, String)| Self::Abort(attempt_id, escape(&text)))?,
            14 => Self::OfferImage(parse(what, body)?),
            15 => Self::Stored(parse(what, body)?),
            17 => parse(what, body).map(|()| Self::Beat)?,
            18 => parse(what, body)
                .map(|(attempt_id, text): (_, String)| Self::LanesFailed(attempt_id, escape(&text)))?,
            19 => Self::Ask(parse(what, body)?),
            20 => parse(what, body).map(|(attempt_id, outcome)| Self::Outcome(attempt_id, outcome))?,
            21 => Self::Done(parse(what, body)?),
            22 => Self::BlockDigests(parse(what, body)?),
            23 => Self::Checked(parse(what, body)?),
            Self::STATE_KIND => Self::State(StateFrame::decode(body.to_vec())?),
            other => return Err(WireError::Kind(other)),
        };
        message.check_bounds()?;
        Ok(message)
    }

    fn check_bounds(&self) -> Result<(), WireError> {
        match self {
            Self::Hello(hello) => {
                bound("a guest's name", hello.name.len(), NAME_MAX)?;
                if !is_shown_as_it_is(&hello.name) {
                    return Err(WireError::Malformed("name of a guest"));
                }
                bound("a machine's description", hello.details.len(), DETAILS_MAX)?;
                hello.ram.validate().map_err(|_| WireError::Malformed("RAM layout"))?;
                hello.lanes.check_bounds()
            }
            Self::OfferImage(offer) => offer.check_bounds(),
            Self::Ready(ready, ..) => bound("a description of lanes", ready.body.len(), LANE_BODY_MAX),
            Self::Digests(digests) => bound("a list of digests", digests.len(), DIGESTS_MAX),
            Self::BlockDigests(blocks) => bound("a list of digests", blocks.digests.len(), DIGESTS_MAX),
            _ => Ok(()),
        }
    }
}

impl StateFrame {
    /// The length of the offset after the bytes.
    const OFFSET_LEN: usize = size_of::<u64>();

    fn decode(mut body: Vec<u8>) -> Result<Self, WireError> {
        let bytes = body.len().checked_sub(Self::OFFSET_LEN).filter(|&bytes| bytes > 0);
        let bytes = bytes.ok_or(WireError::Malformed("State"))?;
        bound("a part of the saved state", bytes, STATE_FRAME_MAX)?;
        let offset = body[bytes..].try_into().map_err(|_| WireError::Malformed("State"))?;
        body.truncate(bytes);
        Ok(Self { offset: u64::from_le_bytes(offset), bytes: body })
    }
}

impl LaneOffer {
    /// Whether it is within its bounds: the destination looks only then whether it has such a transport.
    ///
    /// # Errors
    /// [`WireError`], which says what is not.
    pub(crate) fn check_bounds(&self) -> Result<(), WireError> {
        bound("a transport's name", self.scheme.len(), SCHEME_MAX)?;
        let named = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if self.scheme.is_empty() || !self.scheme.bytes().all(named) {
            return Err(WireError::Malformed("transport's name"));
        }
        if self.lanes == 0 {
            return Err(WireError::Malformed("number of lanes"));
        }
        bound("a number of lanes", self.lanes.into(), LANES_MAX.into())?;
        bound("a description of lanes", self.body.len(), LANE_BODY_MAX)
    }
}

impl ImageOffer {
    fn check_bounds(&self) -> Result<(), WireError> {
        let malformed = || WireError::Malformed("offer of a file");
        bound("a file's name", self.name.len(), FILE_NAME_MAX)?;
        if self.len_bytes > IMAGE_MAX {
            return Err(malformed());
        }
        let parts_bytes = match &self.content {
            None => 0,
            Some(ImageContent { parts, lanes }) => {
                lanes.check_bounds()?;
                parts.validate().map_err(|_| malformed())?;
                let last = parts.regions.last().ok_or_else(malformed)?;
                if last.guest_address + last.len_bytes > self.len_bytes.next_multiple_of(PAGE_BYTES) {
                    return Err(malformed());
                }
                parts.total_bytes()
            }
        };
        if self.data_bytes > parts_bytes { Err(malformed()) } else { Ok(()) }
    }
}

/// The name and the longest body of each kind; the body's length bounds every list in it.
fn kind_bound(kind: u16) -> Option<(&'static str, usize)> {
    Some(match kind {
        1 => ("Hello", DETAILS_MAX + (64 << 10)),
        2 => ("Ready", 16 << 10),
        3 => ("Refused", TEXT_MAX + 64),
        Message::TRANSPORT_KIND => ("Transport", TRANSPORT_BODY_MAX),
        6 => ("RoundClosed", 8),
        7 => ("Digests", DIGESTS_MAX * 32 + 8),
        8 => ("Final", 64),
        9 => ("Prepared", 64),
        10 => ("Go", 16),
        11 => ("Running", 16),
        12 => ("Alive", 64),
        13 => ("Abort", TEXT_MAX + 64),
        14 => ("OfferImage", 64 << 10),
        15 => ("Stored", 16),
        17 => ("Beat", 0),
        18 => ("LanesFailed", TEXT_MAX + 64),
        19 => ("Ask", 16),
        20 => ("Outcome", 17),
        21 => ("Done", 16),
        22 => ("BlockDigests", DIGESTS_MAX * 37 + 8),
        23 => ("Checked", 8),
        Message::STATE_KIND => ("State", STATE_FRAME_MAX + StateFrame::OFFSET_LEN),
        _ => return None,
    })
}

fn parse<T: DeserializeOwned>(what: &'static str, body: &[u8]) -> Result<T, WireError> {
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        _ => Err(WireError::Malformed(what)),
    }
}

fn bound(what: &'static str, len: usize, max: usize) -> Result<(), WireError> {
    if len > max { Err(WireError::TooLong { what, len, max }) } else { Ok(()) }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::{RamLayout, RegionLayout};
    use crate::wire::{
        AttemptId, BlockDigest, BlockDigests, Completion, Final, Hello, LaneReady, LockToken, Outcome,
        Refusal, SwitchCosts,
    };

    const ATTEMPT_ID: AttemptId = AttemptId([7; 16]);

    /// As many lanes as there may be, with as much to say of them.
    fn lanes() -> LaneOffer {
        let (scheme, body) = ("x-1".repeat(10) + "yz", vec![0xff; LANE_BODY_MAX]);
        LaneOffer { scheme, lanes: LANES_MAX, body }
    }

    fn hello() -> Hello {
        Hello {
            attempt_id: ATTEMPT_ID,
            name: "tern".into(),
            ram: RamLayout { regions: vec![RegionLayout { guest_address: 0, len_bytes: 16 << 20 }] },
            details: vec![1, 2, 3],
            lanes: lanes(),
            lock: Some(LockToken([7; 16])),
            state_bytes: u64::MAX,
        }
    }

    /// An offer with the most parts allowed, for a file that ends within its last page.
    fn image() -> ImageOffer {
        let part = |index: u64| RegionLayout { guest_address: index << 33, len_bytes: 8192 };
        let parts = RamLayout { regions: (0..1024).map(part).collect() };
        ImageOffer {
            attempt_id: ATTEMPT_ID,
            name: "ö".repeat(127),
            len_bytes: (1023 << 33) + 4097,
            data_bytes: parts.total_bytes(),
            content: Some(ImageContent { parts, lanes: lanes() }),
        }
    }

    pub(crate) fn one_of_each() -> Vec<Message> {
        vec![
            Message::Hello(hello()),
            Message::Ready(
                LaneReady { body: vec![0xff; LANE_BODY_MAX] },
                SwitchCosts { record_us: 700, revoke_us: u64::MAX, state_max_bytes: 1 },
            ),
            Message::Refused(Refusal::Memory { needed_bytes: 2, available_bytes: 1 }),
            Message::Transport(vec![0xff; TRANSPORT_BODY_MAX]),
            Message::RoundClosed(u32::MAX),
            Message::Digests(vec![[0xff; 32]; DIGESTS_MAX]),
            Message::Final(Final {
                attempt_id: ATTEMPT_ID,
                round: u32::MAX,
                compare_blocks: u64::MAX,
                state_bytes: u64::MAX,
            }),
            Message::Prepared(
                ATTEMPT_ID,
                Completion { verified_pages: u64::MAX, revoke_us: u64::MAX, verify_us: u64::MAX, load_us: 1 },
            ),
            Message::Go(ATTEMPT_ID),
            Message::Running(ATTEMPT_ID),
            Message::Alive(ATTEMPT_ID, u64::MAX, u64::MAX),
            Message::Abort(ATTEMPT_ID, "cancelled".into()),
            Message::OfferImage(image()),
            Message::Stored(ATTEMPT_ID),
            Message::LanesFailed(ATTEMPT_ID, "the cable is out".into()),
            Message::Ask(ATTEMPT_ID),
            Message::Outcome(ATTEMPT_ID, Outcome::Unknown),
            Message::Done(ATTEMPT_ID),
            Message::BlockDigests(BlockDigests {
                now: true,
                digests: vec![BlockDigest { block: u32::MAX, digest: [0xff; 32] }; DIGESTS_MAX],
            }),
            Message::Checked(u32::MAX),
            Message::State(StateFrame { offset: u64::MAX, bytes: vec![7; STATE_FRAME_MAX] }),
        ]
    }

    #[test]
    fn each_message_comes_back_as_it_was_also_at_its_bound() {
        let kinds = (1..=15).filter(|&kind| kind != 5).chain(18..);
        for (message, kind) in one_of_each().into_iter().zip(kinds) {
            assert_eq!(message.kind(), kind);
            let body = message.encode().unwrap();
            assert!(body.len() <= Message::body_max(kind).unwrap());
            assert_eq!(Message::decode(kind, &body).unwrap(), message);
            assert_eq!(Message::decode_owned(kind, body).unwrap(), message);
        }
        for kind in [0, 5, 16, 25] {
            assert_eq!(Message::body_max(kind), Err(WireError::Kind(kind)));
        }
    }

    #[test]
    fn a_body_that_is_cut_or_has_more_behind_it_is_malformed() {
        // A part of the state and a transport's request are as long as their frame's head says, and the
        // digest covers the head.
        let opaque = |message: &Message| matches!(message, Message::State(_) | Message::Transport(_));
        let fixed = one_of_each().into_iter().filter(|message| !opaque(message));
        for message in fixed {
            let mut body = message.encode().unwrap();
            assert!(Message::decode(message.kind(), &body[..body.len() - 1]).is_err(), "{}", message.name());
            body.push(0);
            assert!(Message::decode(message.kind(), &body).is_err(), "{}", message.name());
            assert!(Message::decode_owned(message.kind(), body).is_err(), "{}", message.name());
        }
    }

    #[test]
    fn lanes_that_failed_say_why_in_a_bounded_text() {
        let failed = Message::LanesFailed(ATTEMPT_ID, "the cable is out".into());
        assert_eq!(Message::decode(18, &failed.encode().unwrap()), Ok(failed));
        let body = Message::LanesFailed(ATTEMPT_ID, "ö".repeat(TEXT_MAX)).encode().unwrap();
        assert!(matches!(Message::decode(18, &body), Ok(Message::LanesFailed(ATTEMPT_ID, _))));
    }

    #[test]
    fn no_text_of_a_peer_reaches_a_terminal_as_it_is() {
        const HOSTILE: &str = "no\x1b[2K\r\nwhere: at the destination, running";
        let refusals = [
            Refusal::NameTaken as fn(String) -> Refusal,
            Refusal::Incompatible,
            Refusal::Transport,
            Refusal::FileExists,
            Refusal::Image,
            Refusal::State,
            Refusal::Lock,
        ];
        let mut texts: Vec<_> = refusals.map(|refusal| Message::Refused(refusal(HOSTILE.into()))).into();
        texts.push(Message::Abort(ATTEMPT_ID, HOSTILE.into()));
        texts.push(Message::LanesFailed(ATTEMPT_ID, HOSTILE.into()));
        for message in texts {
            let text = match Message::decode(message.kind(), &message.encode().unwrap()).unwrap() {
                Message::Refused(refusal) => refusal.to_string(),
                Message::Abort(_, text) | Message::LanesFailed(_, text) => text,
                other => panic!("{other:?}"),
            };
            assert!(text.contains(r"no\u{1b}[2K\r\nwhere"), "{text}");
        }
        let named = Message::Hello(Hello { name: HOSTILE.into(), ..hello() });
        let decoded = Message::decode(named.kind(), &named.encode().unwrap());
        assert!(matches!(decoded, Err(WireError::Malformed(_))), "{decoded:?}");
    }

    #[test]
    fn a_beat_has_no_body() {
        assert_eq!(Message::decode(17, &Message::Beat.encode().unwrap()), Ok(Message::Beat));
        assert!(matches!(Message::decode(17, &[0]), Err(WireError::TooLong { .. })));
    }

    #[test]
    fn digests_of_blocks_come_back_also_at_their_bound() {
        let digests = vec![BlockDigest { block: u32::MAX, digest: [0xff; 32] }; DIGESTS_MAX];
        for message in [
            Message::BlockDigests(BlockDigests { now: true, digests: digests.clone() }),
            Message::Checked(u32::MAX),
        ] {
            let body = message.encode().unwrap();
            assert_eq!(Message::decode(message.kind(), &body), Ok(message));
        }
        let more = BlockDigests { now: false, digests: [&digests[..], &digests[..1]].concat() };
        let body = postcard::to_stdvec(&BlockDigests { digests: Vec::new(), ..more.clone() }).unwrap();
        assert!(Message::decode(22, &body).is_ok());
        assert!(matches!(Message::BlockDigests(more).encode(), Err(WireError::TooLong { .. })));
        // Short in bytes, but too many.
        let small = vec![BlockDigest { block: 0, digest: [0; 32] }; DIGESTS_MAX + 1];
        let body = postcard::to_stdvec(&BlockDigests { now: false, digests: small }).unwrap();
        assert!(matches!(Message::decode(22, &body), Err(WireError::TooLong { .. })));
    }

    #[test]
    fn bounds_hold_before_anything_is_believed() {
        let refused = |hello: Hello| Message::decode(1, &postcard::to_stdvec(&hello).unwrap()).unwrap_err();
        assert!(matches!(
            refused(Hello { name: "x".repeat(NAME_MAX + 1), ..hello() }),
            WireError::TooLong { .. }
        ));
        let of_lanes = |lanes| refused(Hello { lanes, ..hello() });
        assert_eq!(of_lanes(LaneOffer { lanes: 0, ..lanes() }), WireError::Malformed("number of lanes"));
        for scheme in ["", "RDMA", "tcp\n", "rdma/ü"] {
            let nameless = LaneOffer { scheme: scheme.into(), ..lanes() };
            assert_eq!(of_lanes(nameless), WireError::Malformed("transport's name"), "{scheme}");
        }
        for too_long in [
            LaneOffer { lanes: 65, ..lanes() },
            LaneOffer { scheme: "x".repeat(SCHEME_MAX + 1), ..lanes() },
            LaneOffer { body: vec![0; LANE_BODY_MAX + 1], ..lanes() },
        ] {
            assert!(matches!(of_lanes(too_long), WireError::TooLong { .. }));
        }
        let ready = LaneReady { body: vec![0; LANE_BODY_MAX + 1] };
        let body = postcard::to_stdvec(&(ready, SwitchCosts::default())).unwrap();
        assert!(matches!(Message::decode(2, &body), Err(WireError::TooLong { .. })));
        let body = vec![0; TRANSPORT_BODY_MAX + 1];
        assert!(matches!(Message::decode_owned(4, body), Err(WireError::TooLong { .. })));
        let ram = RamLayout { regions: vec![RegionLayout { guest_address: 0, len_bytes: 1 }] };
        assert_eq!(refused(Hello { ram, ..hello() }), WireError::Malformed("RAM layout"));
        assert!(matches!(Message::decode(10, &[0; 17]), Err(WireError::TooLong { .. })));
    }

    #[test]
    fn an_offered_file_is_bounded_and_its_parts_lie_in_it() {
        let decode = |offer: ImageOffer| Message::decode(14, &postcard::to_stdvec(&offer).unwrap());
        let nothing = ImageOffer { data_bytes: 0, content: None, ..image() };
        assert!(decode(nothing.clone()).is_ok());
        for wrong in [
            ImageOffer { name: "x".repeat(256), ..image() },
            ImageOffer { len_bytes: IMAGE_MAX + 1, ..image() },
            ImageOffer { len_bytes: 1023 << 33, ..image() },
            ImageOffer { data_bytes: image().data_bytes + 1, ..image() },
            ImageOffer { data_bytes: 1, ..nothing.clone() },
            ImageOffer { len_bytes: u64::MAX, ..nothing },
        ] {
            assert!(decode(wrong.clone()).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_long_reason_is_cut_at_a_character() {
        let text = "ö".repeat(TEXT_MAX);
        let body = Message::Abort(ATTEMPT_ID, text.clone()).encode().unwrap();
        let Message::Abort(_, cut) = Message::decode(13, &body).unwrap() else { panic!("another kind") };
        assert!(!cut.is_empty() && text.starts_with(&cut));
    }

    #[test]
    fn a_part_of_the_state_has_bytes_and_not_too_many() {
        for bytes in [0, 8] {
            let body = vec![0; bytes];
            assert_eq!(Message::decode_owned(24, body), Err(WireError::Malformed("State")));
        }
        let body = vec![0; STATE_FRAME_MAX + 9];
        assert!(matches!(Message::decode(24, &body), Err(WireError::TooLong { .. })));
        assert!(matches!(Message::decode_owned(24, body), Err(WireError::TooLong { .. })));
    }

    #[test]
    fn the_document_of_the_protocol_has_each_message_and_its_bound() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/protocol.md");
        let document = std::fs::read_to_string(path).unwrap();
        let kinds = (1..100).filter_map(|kind| kind_bound(kind).map(|(name, max)| (kind, name, max)));
        let rows = kinds.map(|(kind, name, max)| {
            let row = format!("| {kind} | {name} | {max} |");
            assert!(document.contains(&row), "docs/protocol.md lacks {row}");
        });
        assert!(rows.count() > 20);
        assert!(document.contains(&format!("version {}\n", crate::wire::PROTOCOL_VERSION)));
    }

    proptest! {
        #[test]
        fn no_bytes_of_a_peer_make_it_panic(kind in 0..26u16, body in prop::collection::vec(any::<u8>(), 0..300)) {
            let read = Message::decode(kind, &body);
            prop_assert_eq!(Message::decode_owned(kind, body), read);
        }

        #[test]
        fn a_part_of_the_state_comes_back_as_it_was(
            offset: u64,
            bytes in prop::collection::vec(any::<u8>(), 1..300),
        ) {
            let message = Message::State(StateFrame { offset, bytes });
            let body = message.encode().unwrap();
            prop_assert_eq!(Message::decode_owned(24, body), Ok(message));
        }
    }
}
