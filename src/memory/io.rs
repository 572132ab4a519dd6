#![expect(
    unsafe_code,
    reason = "sendmsg(2) and readv(2) between a socket and guest RAM, with no copy in between"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::slice::GuestSlice;

/// Sends `head` and then all `slices`, straight from guest RAM. At most 1,023 slices: the kernel's `IOV_MAX`,
/// less one.
///
/// # Errors
/// Those of `sendmsg(2)`; a timeout set on the socket is `WouldBlock`. Part may have been sent.
pub fn send_from(socket: BorrowedFd<'_>, head: &[u8], slices: &[GuestSlice<'_>]) -> io::Result<()> {
    let head = libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() };
    let mut vectors: Vec<libc::iovec> = std::iter::once(head).chain(slices.iter().map(vector)).collect();
    transfer(&mut vectors, io::ErrorKind::WriteZero, |vectors| {
        // SAFETY: all zeros is a message without address, vectors and ancillary data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = vectors.as_mut_ptr();
        message.msg_iovlen = vectors.len() as _;
        // Not `writev`: a closed peer must cause an error and no SIGPIPE, which would end the VMM. SAFETY:
        // each vector covers a live borrow: the head's, or guest RAM of a `GuestSlice`. The kernel only
        // reads.
        unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) }
    })
}

/// Fills all `slices`, in order, straight into guest RAM, and then `next` with the bytes that follow. At most
/// 1,023 slices: the kernel's `IOV_MAX`, less one.
///
/// # Errors
/// Those of `readv(2)`; `UnexpectedEof` if the peer closes first. Part may have been written.
pub fn receive_into(socket: BorrowedFd<'_>, slices: &[GuestSlice<'_>], next: &mut [u8]) -> io::Result<()> {
    let next = libc::iovec { iov_base: next.as_mut_ptr().cast(), iov_len: next.len() };
    let mut vectors: Vec<libc::iovec> = slices.iter().map(vector).chain([next]).collect();
    transfer(&mut vectors, io::ErrorKind::UnexpectedEof, |vectors| {
        let count = libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: each vector is guest RAM of a `GuestSlice`, writable while that lives and never a Rust
        // reference, or all of `next`, which is borrowed for this call alone.
        unsafe { libc::readv(socket.as_raw_fd(), vectors.as_ptr(), count) }
    })
}

fn vector(slice: &GuestSlice<'_>) -> libc::iovec {
    libc::iovec { iov_base: slice.as_ptr().cast(), iov_len: slice.len() }
}

/// Repeats `call` until every vector is done, advancing past the bytes that the kernel took.
fn transfer(
    mut vectors: &mut [libc::iovec],
    on_end: io::ErrorKind,
    call: impl Fn(&mut [libc::iovec]) -> libc::ssize_t,
) -> io::Result<()> {
    while !vectors.is_empty() {
        let mut moved = match usize::try_from(call(vectors)) {
            Ok(0) => return Err(on_end.into()),
            Ok(moved) => moved,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return Err(error),
            },
        };
        while let Some(first) = vectors.first_mut() {
            if moved < first.iov_len {
                first.iov_base = first.iov_base.wrapping_byte_add(moved);
                first.iov_len -= moved;
                break;
            }
            moved -= first.iov_len;
            vectors = &mut vectors[1..];
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::thread;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::memory::{GuestRam, PageRun};

    #[test]
    fn scattered_pages_cross_a_socket_that_takes_them_in_pieces() {
        const PAGES: u64 = 1024;
        let make = || -> GuestMemoryMmap<()> {
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096 * usize::try_from(PAGES).unwrap())])
                .unwrap()
        };
        let (from, to) = (make(), make());
        for page in 0..PAGES {
            from.write_obj(page + 1, GuestAddress(page * 4096 + 8 * (page % 512))).unwrap();
        }
        let runs: Vec<_> =
            (0..PAGES / 3).map(|n| PageRun { region: 0, first_page: n * 3, pages: 1 + n % 2 }).collect();
        let (source, destination) = UnixStream::pair().unwrap();
        let ram = GuestRam::from_vm_memory(&to).unwrap();
        let receiver = {
            let runs = runs.clone();
            thread::spawn(move || {
                let slices: Vec<_> = runs.iter().map(|&run| ram.slice(run).unwrap()).collect();
                let mut head = [0; 5];
                io::Read::read_exact(&mut &destination, &mut head).unwrap();
                let mut next = [0; 3];
                receive_into(destination.as_fd(), &slices, &mut next).unwrap();
                assert_eq!(&next, b"fly");
                head
            })
        };
        let ram = GuestRam::from_vm_memory(&from).unwrap();
        let slices: Vec<_> = runs.iter().map(|&run| ram.slice(run).unwrap()).collect();
        send_from(source.as_fd(), b"terns", &slices).unwrap();
        send_from(source.as_fd(), b"fly", &[]).unwrap();
        assert_eq!(&receiver.join().unwrap(), b"terns");
        for page in 0..PAGES {
            let sent = runs.iter().any(|run| (run.first_page..run.first_page + run.pages).contains(&page));
            let value: u64 = to.read_obj(GuestAddress(page * 4096 + 8 * (page % 512))).unwrap();
            assert_eq!(value, if sent { page + 1 } else { 0 }, "page {page}");
        }
    }

    #[test]
    fn a_closed_peer_is_an_error_not_a_hang() {
        let memory: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        let ram = GuestRam::from_vm_memory(&memory).unwrap();
        let page = ram.slice(PageRun { region: 0, first_page: 0, pages: 1 }).unwrap();
        let (source, destination) = UnixStream::pair().unwrap();
        drop(source);
        let error = receive_into(destination.as_fd(), &[page], &mut []).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
