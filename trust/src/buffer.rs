//! A queue of bytes in one allocation.

/// Bytes between a beginning and an end, with space after them.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Buffer {
    /// The bytes that are in the queue.
    pub(crate) fn content(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// The same, to be decrypted in place.
    pub(crate) fn content_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.end]
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Space behind the content for at least this many bytes.
    pub(crate) fn space(&mut self, len: usize) -> &mut [u8] {
        if self.is_empty() {
            (self.start, self.end) = (0, 0);
        }
        if self.bytes.len() - self.end < len && self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.bytes.len() - self.end < len {
            self.bytes.resize(self.end + len, 0);
        }
        &mut self.bytes[self.end..]
    }

    /// The first bytes of the space are content now.
    pub(crate) fn filled(&mut self, len: usize) {
        self.end = (self.end + len).min(self.bytes.len());
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.space(bytes.len())[..bytes.len()].copy_from_slice(bytes);
        self.filled(bytes.len());
    }

    pub(crate) fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    /// Drops the first bytes of the content.
    pub(crate) fn discard(&mut self, len: usize) {
        self.start = (self.start + len).min(self.end);
    }

    /// Moves the first bytes of the content out; returns how many.
    pub(crate) fn pop_into(&mut self, into: &mut [u8]) -> usize {
        let len = into.len().min(self.end - self.start);
        into[..len].copy_from_slice(&self.content()[..len]);
        self.discard(len);
        len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_in_the_order_in_which_they_went_in() {
        let mut buffer = Buffer::default();
        let (mut next, mut expected, mut out) = (0u8, 0u8, [0; 7]);
        for round in 0..1000 {
            let bytes: Vec<_> = (0..round % 9)
                .map(|_| {
                    next = next.wrapping_add(1);
                    next
                })
                .collect();
            buffer.push(&bytes);
            let len = buffer.pop_into(&mut out);
            for &byte in &out[..len] {
                expected = expected.wrapping_add(1);
                assert_eq!(byte, expected);
            }
        }
        assert!(buffer.bytes.len() < 2000, "the space of what was taken is used again");
    }
}
