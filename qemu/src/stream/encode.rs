//! What the blob repeats of the stream.

/// A length in one byte, and the bytes: at most 255.
pub(crate) fn counted(name: &[u8]) -> impl Iterator<Item = u8> {
    let name = &name[..name.len().min(usize::from(u8::MAX))];
    let len = u8::try_from(name.len()).unwrap_or(u8::MAX);
    std::iter::once(len).chain(name.iter().copied())
}
