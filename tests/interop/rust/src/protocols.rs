//! The test protocols, each with its serving side. The asking sides are in [`crate::actions`].
//!
//! | protocol | what the serving side does |
//! |---|---|
//! | `/perf/1.0.0` | reads 8 bytes (how much to send), then everything until the end, then sends that much and ends |
//! | `/kas-interop/echo/1.0.0` | sends back what it reads, until the end |
//! | `/kas-interop/half-close/1.0.0` | reads until the end, then sends count and check, and ends |
//! | `/kas-interop/first-close/1.0.0` | ends its own direction at once, then reads until the end and reports |
//! | `/kas-interop/bulk/1.0.0` | reads [`Bulk`], then sends and receives the pattern both ways at once, reading as slowly as told |
//! | `/kas-interop/hold/1.0.0` | reads nothing until the order `release`, then as half-close |
//! | `/kas-interop/reset/1.0.0` | reads one byte, then resets |
//!
//! The pattern repeats after a prime number of bytes near 64 KiB, so that no lost, doubled or swapped piece of a usual
//! size goes unnoticed.

use std::io;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use futures::future::try_join;
use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::{PeerId, Stream, StreamProtocol};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::report::report;

pub const PERF: StreamProtocol = StreamProtocol::new("/perf/1.0.0");
pub const PING: StreamProtocol = StreamProtocol::new("/ipfs/ping/1.0.0");
pub const ECHO: StreamProtocol = StreamProtocol::new("/kas-interop/echo/1.0.0");
pub const HALF_CLOSE: StreamProtocol = StreamProtocol::new("/kas-interop/half-close/1.0.0");
pub const FIRST_CLOSE: StreamProtocol = StreamProtocol::new("/kas-interop/first-close/1.0.0");
pub const BULK: StreamProtocol = StreamProtocol::new("/kas-interop/bulk/1.0.0");
pub const HOLD: StreamProtocol = StreamProtocol::new("/kas-interop/hold/1.0.0");
pub const RESET: StreamProtocol = StreamProtocol::new("/kas-interop/reset/1.0.0");

const PERIOD: usize = 65_521;
const LARGEST_WRITE: usize = 1 << 20;

/// `PATTERN[offset % PERIOD..]` holds at least [`LARGEST_WRITE`] bytes of the pattern from any offset on.
static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    (0..PERIOD + LARGEST_WRITE).map(|index| ((index % PERIOD) * 167 + (index % PERIOD) / 251) as u8).collect()
});

/// The pattern from `offset` on, at most [`LARGEST_WRITE`] bytes.
pub fn pattern(offset: u64, size: usize) -> &'static [u8] {
    let start = (offset % PERIOD as u64) as usize;
    &PATTERN[start..start + size]
}

/// What was read until the end of a stream.
#[derive(Default)]
pub struct Received {
    pub bytes: u64,
    /// Whether it was the pattern, from its start.
    pub intact: bool,
    pub seconds: f64,
}

impl Received {
    pub fn to_json(&self) -> Value {
        json!({ "received": self.bytes, "intact": self.intact, "seconds": self.seconds })
    }
}

/// How fast to read.
#[derive(Clone, Copy, Default)]
pub struct Pace {
    /// Nothing is read for this long at first.
    pub stall: Duration,
    /// Pause after each read.
    pub pause: Duration,
    /// Bytes per read, at most; 0 means 64 KiB.
    pub chunk: usize,
}

/// Read until the end of the stream, checking the pattern.
pub async fn drain(reader: &mut (impl AsyncRead + Unpin), pace: Pace) -> io::Result<Received> {
    tokio::time::sleep(pace.stall).await;
    let mut buffer = vec![0; if pace.chunk == 0 { 65_536 } else { pace.chunk.min(LARGEST_WRITE) }];
    let mut received = Received { intact: true, ..Received::default() };
    let start = Instant::now();
    loop {
        let count = reader.read(&mut buffer).await?;
        if count == 0 {
            received.seconds = start.elapsed().as_secs_f64();
            return Ok(received);
        }
        received.intact &= buffer[..count] == *pattern(received.bytes, count);
        received.bytes += count as u64;
        if !pace.pause.is_zero() {
            tokio::time::sleep(pace.pause).await;
        }
    }
}

/// Write `bytes` of the pattern in pieces of `size`, then end this direction.
pub async fn pour(writer: &mut (impl AsyncWrite + Unpin), bytes: u64, size: usize) -> io::Result<()> {
    write_pattern(writer, bytes, size).await?;
    writer.close().await
}

async fn write_pattern(writer: &mut (impl AsyncWrite + Unpin), bytes: u64, size: usize) -> io::Result<()> {
    let size = size.clamp(1, LARGEST_WRITE);
    let mut sent = 0;
    while sent < bytes {
        let piece = (bytes - sent).min(size as u64) as usize;
        writer.write_all(pattern(sent, piece)).await?;
        sent += piece as u64;
    }
    writer.flush().await
}

/// `/perf/1.0.0`, client: upload, end, download. Returns the seconds of both and what came.
pub async fn perf_client(mut stream: Stream, upload: u64, download: u64, size: usize) -> io::Result<(f64, Received)> {
    let start = Instant::now();
    stream.write_all(&download.to_be_bytes()).await?;
    pour(&mut stream, upload, size).await?;
    // The first byte, or the end, says that the other side has read everything.
    let mut first = [0];
    let count = stream.read(&mut first).await?;
    let uploaded = start.elapsed().as_secs_f64();
    let begun = Instant::now();
    let mut received = Received { bytes: count as u64, intact: true, seconds: 0.0 };
    let mut buffer = vec![0; 65_536];
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            break;
        }
        received.bytes += count as u64;
    }
    received.seconds = begun.elapsed().as_secs_f64();
    Ok((uploaded, received))
}

async fn perf_server(mut stream: Stream) -> io::Result<Value> {
    let mut wanted = [0; 8];
    stream.read_exact(&mut wanted).await?;
    let wanted = u64::from_be_bytes(wanted);
    let mut buffer = vec![0; 65_536];
    let mut received = 0;
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            break;
        }
        received += count as u64;
    }
    pour(&mut stream, wanted, 65_536).await?;
    Ok(json!({ "received": received, "sent": wanted }))
}

async fn echo_server(mut stream: Stream) -> io::Result<Value> {
    let mut buffer = vec![0; 65_536];
    let mut echoed = 0;
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            stream.close().await?;
            return Ok(json!({ "received": echoed, "sent": echoed }));
        }
        stream.write_all(&buffer[..count]).await?;
        stream.flush().await?;
        echoed += count as u64;
    }
}

/// The answer of half-close and hold: count (8 bytes, big-endian) and whether it was the pattern (1 byte).
async fn answer(mut stream: Stream) -> io::Result<Value> {
    let received = drain(&mut stream, Pace::default()).await?;
    stream.write_all(&received.bytes.to_be_bytes()).await?;
    stream.write_all(&[received.intact.into()]).await?;
    stream.close().await?;
    Ok(received.to_json())
}

async fn first_close_server(mut stream: Stream) -> io::Result<Value> {
    stream.close().await?;
    Ok(drain(&mut stream, Pace::default()).await?.to_json())
}

/// The header of the bulk protocol: 32 bytes, big-endian.
#[derive(Clone, Copy, Default)]
pub struct Bulk {
    /// Bytes from the opener to the other side.
    pub up: u64,
    /// Bytes from the other side to the opener.
    pub down: u64,
    /// Bytes per write of the other side.
    pub write_size: u32,
    /// How the other side reads.
    pub chunk: u32,
    pub pause_micros: u32,
    pub stall_millis: u32,
}

impl Bulk {
    const SIZE: usize = 32;

    pub fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::SIZE);
        bytes.extend(self.up.to_be_bytes());
        bytes.extend(self.down.to_be_bytes());
        for field in [self.write_size, self.chunk, self.pause_micros, self.stall_millis] {
            bytes.extend(field.to_be_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: [u8; Self::SIZE]) -> Self {
        let long = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let short = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        Self {
            up: long(0),
            down: long(8),
            write_size: short(16),
            chunk: short(20),
            pause_micros: short(24),
            stall_millis: short(28),
        }
    }

    fn pace(self) -> Pace {
        Pace {
            stall: Duration::from_millis(self.stall_millis.into()),
            pause: Duration::from_micros(self.pause_micros.into()),
            chunk: self.chunk as usize,
        }
    }
}

/// Both directions of a bulk stream at once.
pub async fn both_ways(stream: Stream, send: u64, size: usize, pace: Pace) -> io::Result<Received> {
    let (mut reader, mut writer) = stream.split();
    let ((), received) = try_join(pour(&mut writer, send, size), drain(&mut reader, pace)).await?;
    Ok(received)
}

async fn bulk_server(mut stream: Stream) -> io::Result<Value> {
    let mut header = [0; Bulk::SIZE];
    stream.read_exact(&mut header).await?;
    let bulk = Bulk::from_bytes(header);
    let received = both_ways(stream, bulk.down, bulk.write_size as usize, bulk.pace()).await?;
    let mut fields = received.to_json();
    fields["sent"] = bulk.down.into();
    fields["complete"] = (received.bytes == bulk.up).into();
    Ok(fields)
}

async fn hold_server(stream: Stream, mut release: watch::Receiver<u64>) -> io::Result<Value> {
    release.mark_unchanged();
    report("holding", json!({}));
    release.changed().await.map_err(io::Error::other)?;
    answer(stream).await
}

async fn reset_server(mut stream: Stream) -> io::Result<Value> {
    stream.read_exact(&mut [0]).await?;
    drop(stream); // dropped without a close: yamux sends RST
    Ok(json!({}))
}

/// Serve one inbound stream and report how it went: `served` or `serving-failed`.
pub async fn serve(protocol: StreamProtocol, peer: PeerId, stream: Stream, release: watch::Receiver<u64>) {
    let result = match protocol.as_ref() {
        "/perf/1.0.0" => perf_server(stream).await,
        "/kas-interop/echo/1.0.0" => echo_server(stream).await,
        "/kas-interop/half-close/1.0.0" => answer(stream).await,
        "/kas-interop/first-close/1.0.0" => first_close_server(stream).await,
        "/kas-interop/bulk/1.0.0" => bulk_server(stream).await,
        "/kas-interop/hold/1.0.0" => hold_server(stream, release).await,
        _ => reset_server(stream).await,
    };
    let (event, mut fields) = match result {
        Ok(fields) => ("served", fields),
        Err(error) => ("serving-failed", json!({ "error": error.to_string(), "kind": format!("{:?}", error.kind()) })),
    };
    fields["protocol"] = protocol.to_string().into();
    fields["peer"] = peer.to_string().into();
    report(event, fields);
}
