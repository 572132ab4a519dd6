//! One or several plain TCP streams under the conditions of the lanes: threads of one program at both ends,
//! and at both ends as much memory as a guest has, all touched before. `iperf3` has a process for each end
//! and one short buffer in each, which may fit a processor's cache.

use std::io::{self, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use super::failure::Failure;

/// The length of one `write(2)` or `read(2)`: that of a lane's frame.
const PIECE: usize = 4 << 20;

/// The combined speed of `streams` streams that carry `bytes` bytes of memory, in MB/s: over `passes` passes,
/// after one that does not count.
pub(crate) fn speed(address: IpAddr, streams: u8, bytes: u64, passes: usize) -> Result<f64, Failure> {
    measure(address, streams.max(1).into(), bytes, passes).map_err(Failure::system("send by plain TCP"))
}

fn measure(address: IpAddr, streams: usize, bytes: u64, passes: usize) -> io::Result<f64> {
    let each = usize::try_from(bytes).unwrap_or(usize::MAX) / streams;
    let mut ends = (0..streams).map(|_| Ends::new(address, each)).collect::<io::Result<Vec<_>>>()?;
    pass(&mut ends)?;
    let began = Instant::now();
    for _ in 0..passes {
        pass(&mut ends)?;
    }
    Ok((streams * each * passes) as f64 / 1e6 / began.elapsed().as_secs_f64())
}

/// A connection, and the memory at either end.
struct Ends {
    near: TcpStream,
    far: TcpStream,
    from: Vec<u8>,
    into: Vec<u8>,
}

impl Ends {
    fn new(address: IpAddr, bytes: usize) -> io::Result<Self> {
        let listener = TcpListener::bind((address, 0))?;
        let near = TcpStream::connect(listener.local_addr()?)?;
        let (far, _) = listener.accept()?;
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        // Not zeros, so that every page is touched.
        Ok(Self { near, far, from: vec![1; bytes], into: vec![2; bytes] })
    }
}

/// Sends all memory once, on all streams at the same time, and waits until the far ends have received it, as
/// a fence does.
fn pass(ends: &mut [Ends]) -> io::Result<()> {
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for Ends { near, far, from, into } in ends {
            threads.push(scope.spawn(move || {
                from.chunks(PIECE).try_for_each(|piece| near.write_all(piece))?;
                near.read_exact(&mut [0])
            }));
            threads.push(scope.spawn(move || {
                into.chunks_mut(PIECE).try_for_each(|piece| far.read_exact(piece))?;
                far.write_all(&[0])
            }));
        }
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or(Err(io::ErrorKind::Other.into())))
    })
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn all_memory_arrives_on_each_stream() {
        let ends = || Ends::new(Ipv4Addr::LOCALHOST.into(), 3 * PIECE / 2);
        let mut ends = [ends().unwrap(), ends().unwrap()];
        pass(&mut ends).unwrap();
        assert!(ends.iter().all(|ends| ends.from == ends.into));
        assert!(speed(Ipv4Addr::LOCALHOST.into(), 2, 8 << 20, 1).unwrap() > 0.0);
    }
}
