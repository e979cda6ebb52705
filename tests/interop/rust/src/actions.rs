//! What the orders do, and the benchmark, which gives some of them by itself.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use futures::{AsyncReadExt, AsyncWriteExt};
use libp2p::{Multiaddr, PeerId, Stream, StreamProtocol};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};

use crate::Options;
use crate::kaspa::{self, Kaspa};
use crate::node::Ask;
use crate::protocols::{self, Bulk, Pace};
use crate::report::{chain, cpu_seconds, report, text};

/// What an order can reach.
#[derive(Clone)]
pub struct Hands {
    control: libp2p_stream::Control,
    asks: mpsc::Sender<Ask>,
    kaspa: Kaspa,
    release: watch::Sender<u64>,
    filled: Arc<Mutex<HashMap<u64, Stream>>>,
}

/// Carry out one order and say how it went.
pub async fn obey(hands: Hands, order: Value) {
    let id = order["id"].clone();
    match hands.act(&order).await {
        Ok(mut fields) => {
            fields["id"] = id;
            report("done", fields);
        }
        Err(error) => report("failed", json!({ "id": id, "error": error })),
    }
}

fn number(order: &Value, name: &str, default: u64) -> u64 {
    order[name].as_u64().unwrap_or(default)
}

fn word<'a>(order: &'a Value, name: &str) -> Result<&'a str, String> {
    order[name].as_str().ok_or(format!("the order needs a text {name}"))
}

fn address(order: &Value) -> Result<Multiaddr, String> {
    word(order, "addr")?.parse().map_err(text)
}

fn protocol(order: &Value) -> Result<StreamProtocol, String> {
    StreamProtocol::try_from_owned(word(order, "protocol")?.to_owned()).map_err(text)
}

impl Hands {
    pub fn new(
        control: libp2p_stream::Control,
        asks: mpsc::Sender<Ask>,
        kaspa: Kaspa,
        release: watch::Sender<u64>,
    ) -> Self {
        Self { control, asks, kaspa, release, filled: Arc::default() }
    }

    async fn ask<T>(&self, make: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Result<T, String> {
        let (reply, answer) = oneshot::channel();
        self.asks.send(make(reply)).await.map_err(text)?;
        answer.await.map_err(text)
    }

    async fn peer(&self, order: &Value) -> Result<PeerId, String> {
        if let Some(peer) = order["peer"].as_str() {
            return peer.parse().map_err(text);
        }
        let peers = self.ask(|reply| Ask::Peers { reply }).await?;
        match peers[..] {
            [peer] => Ok(peer),
            _ => Err(format!("connected to {} peers: which one?", peers.len())),
        }
    }

    async fn connect(&self, address: Multiaddr, new_port: bool) -> Result<PeerId, String> {
        self.ask(|reply| Ask::Dial { address, new_port, reply }).await?
    }

    async fn disconnect(&self, peer: PeerId) -> Result<(), String> {
        self.ask(|reply| Ask::Disconnect { peer, reply }).await?
    }

    async fn open(&self, peer: PeerId, protocol: StreamProtocol) -> Result<Stream, String> {
        self.control.clone().open_stream(peer, protocol).await.map_err(|error| chain(&error))
    }

    async fn act(&self, order: &Value) -> Result<Value, String> {
        let write = number(order, "write", 65_536) as usize;
        let count = number(order, "count", 1) as usize;
        match word(order, "do")? {
            "connect" => {
                let start = Instant::now();
                let peer = self.connect(address(order)?, order["new_port"] == true).await?;
                Ok(json!({ "peer": peer.to_string(), "seconds": start.elapsed().as_secs_f64() }))
            }
            "disconnect" => {
                self.disconnect(self.peer(order).await?).await?;
                Ok(json!({}))
            }
            "listen" => {
                let address = address(order)?;
                self.ask(|reply| Ask::Listen { address, reply }).await??;
                Ok(json!({}))
            }
            "push" => {
                self.asks.send(Ask::Push { peer: self.peer(order).await? }).await.map_err(text)?;
                Ok(json!({}))
            }
            "open" => {
                let mut stream = self.open(self.peer(order).await?, protocol(order)?).await?;
                stream.write_all(&[0]).await.map_err(text)?;
                stream.close().await.map_err(text)?;
                let mut answer = Vec::new();
                stream.read_to_end(&mut answer).await.map_err(text)?;
                Ok(json!({ "bytes": answer.len() }))
            }
            "ping" => {
                let mut stream = self.open(self.peer(order).await?, protocols::PING).await?;
                let payload = [0x5a; 32];
                let start = Instant::now();
                stream.write_all(&payload).await.map_err(text)?;
                stream.flush().await.map_err(text)?;
                let mut answer = [0; 32];
                stream.read_exact(&mut answer).await.map_err(text)?;
                let rtt = start.elapsed().as_secs_f64();
                stream.close().await.map_err(text)?;
                if answer == payload { Ok(json!({ "rtt": rtt })) } else { Err("the pong differs".to_owned()) }
            }
            "perf" => {
                let (upload, download) = (number(order, "upload", 0), number(order, "download", 0));
                let stream = self.open(self.peer(order).await?, protocols::PERF).await?;
                let cpu = cpu_seconds();
                let (uploaded, received) =
                    protocols::perf_client(stream, upload, download, write).await.map_err(text)?;
                Ok(json!({
                    "upload": upload, "upload_seconds": uploaded, "received": received.bytes,
                    "download_seconds": received.seconds, "write": write, "cpu_seconds": cpu_seconds() - cpu,
                }))
            }
            "echo" => {
                let stream = self.open(self.peer(order).await?, protocols::ECHO).await?;
                echo(stream, number(order, "size", 32) as usize, count).await
            }
            "new-stream" => self.new_streams(self.peer(order).await?, count).await,
            "redial" => self.redial(address(order)?, count).await,
            "streams" => {
                let peer = self.peer(order).await?;
                let mut streams = Vec::with_capacity(count);
                for _ in 0..count {
                    // libp2p-stream drops inbound streams while its acceptor is busy, so each is seen to work first.
                    let mut stream = self.open(peer, protocols::ECHO).await?;
                    round_trip(&mut stream, &mut [7; 32]).await?;
                    streams.push(stream);
                }
                let size = number(order, "size", 65_536);
                let both = |stream| protocols::both_ways(stream, size, write, Pace::default());
                let received = try_join_all(streams.into_iter().map(both)).await.map_err(text)?;
                let complete = received.iter().all(|one| one.intact && one.bytes == size);
                Ok(json!({ "count": count, "complete": complete }))
            }
            "half-close" => {
                let mut stream = self.open(self.peer(order).await?, protocols::HALF_CLOSE).await?;
                protocols::pour(&mut stream, number(order, "bytes", 0), write).await.map_err(text)?;
                counted(stream).await
            }
            "first-close" => {
                let mut stream = self.open(self.peer(order).await?, protocols::FIRST_CLOSE).await?;
                let early = stream.read(&mut [0]).await.map_err(text)?;
                let bytes = number(order, "bytes", 0);
                protocols::pour(&mut stream, bytes, write).await.map_err(text)?;
                Ok(json!({ "early": early, "sent": bytes }))
            }
            "bulk" => self.bulk(order, write).await,
            "fill" => self.fill(order).await,
            "finish" => {
                let number = number(order, "stream", 0);
                let stream = self.filled.lock().expect("not poisoned").remove(&number);
                let mut stream = stream.ok_or("there is no such stream")?;
                stream.close().await.map_err(text)?;
                counted(stream).await
            }
            "release" => {
                self.release.send_modify(|count| *count += 1);
                Ok(json!({}))
            }
            "reset" => {
                let mut stream = self.open(self.peer(order).await?, protocols::ECHO).await?;
                round_trip(&mut stream, &mut [1]).await?;
                drop(stream); // without a close: yamux sends RST
                Ok(json!({}))
            }
            "be-reset" => {
                let mut stream = self.open(self.peer(order).await?, protocols::RESET).await?;
                stream.write_all(&[1]).await.map_err(text)?;
                stream.flush().await.map_err(text)?;
                match stream.read(&mut [0]).await {
                    Ok(bytes) => Ok(json!({ "kind": null, "bytes": bytes })),
                    Err(error) => Ok(json!({ "kind": format!("{:?}", error.kind()), "error": text(error) })),
                }
            }
            "kaspa" => {
                let peer = self.peer(order).await?;
                let stream = self.open(peer, kaspa::PROTOCOL).await?;
                self.kaspa.connect(peer, stream).await
            }
            "kaspa-as-server" => {
                let peer = self.peer(order).await?;
                let stream = self.open(peer, kaspa::PROTOCOL).await?;
                self.kaspa.serve(peer, stream).await;
                Ok(json!({}))
            }
            "kaspa-ping" => {
                let (reply, answer) = oneshot::channel();
                self.kaspa.order(self.peer(order).await?, kaspa::Order::Ping(reply)).await?;
                Ok(json!({ "rtt": answer.await.map_err(|_| "the session ended")? }))
            }
            "kaspa-send" => {
                let (reply, answer) = oneshot::channel();
                let ids = number(order, "ids", 1) as usize;
                let send = kaspa::Order::Send(count as u32, ids, reply);
                self.kaspa.order(self.peer(order).await?, send).await?;
                Ok(json!({ "bytes": answer.await.map_err(|_| "the session ended")? }))
            }
            "kaspa-close" => {
                self.kaspa.order(self.peer(order).await?, kaspa::Order::Close).await?;
                Ok(json!({}))
            }
            other => Err(format!("unknown order {other}")),
        }
    }

    async fn bulk(&self, order: &Value, write: usize) -> Result<Value, String> {
        let bulk = Bulk {
            up: number(order, "up", 0),
            down: number(order, "down", 0),
            write_size: write as u32,
            chunk: number(order, "peer_chunk", 0) as u32,
            pause_micros: number(order, "peer_pause_us", 0) as u32,
            stall_millis: number(order, "peer_stall_ms", 0) as u32,
        };
        let pace = Pace {
            stall: Duration::from_millis(number(order, "stall_ms", 0)),
            pause: Duration::from_micros(number(order, "pause_us", 0)),
            chunk: number(order, "chunk", 0) as usize,
        };
        let mut stream = self.open(self.peer(order).await?, protocols::BULK).await?;
        let start = Instant::now();
        stream.write_all(&bulk.to_bytes()).await.map_err(text)?;
        let received = protocols::both_ways(stream, bulk.up, write, pace).await.map_err(text)?;
        let mut fields = received.to_json();
        fields["sent"] = bulk.up.into();
        fields["complete"] = (received.bytes == bulk.down).into();
        fields["total_seconds"] = start.elapsed().as_secs_f64().into();
        Ok(fields)
    }

    /// Write the pattern until the stream takes no more for a while, and keep the stream.
    async fn fill(&self, order: &Value) -> Result<Value, String> {
        let mut stream = self.open(self.peer(order).await?, protocol(order)?).await?;
        let quiet = Duration::from_millis(number(order, "quiet_ms", 300));
        let most = number(order, "most", 64 << 20);
        let mut bytes = 0;
        while bytes < most {
            let piece = protocols::pattern(bytes, (most - bytes).min(16_384) as usize);
            match tokio::time::timeout(quiet, stream.write(piece)).await {
                Ok(written) => bytes += written.map_err(text)? as u64,
                Err(_) => break,
            }
        }
        let mut filled = self.filled.lock().expect("not poisoned");
        let number = filled.keys().max().map_or(1, |last| last + 1);
        filled.insert(number, stream);
        Ok(json!({ "stream": number, "bytes": bytes }))
    }

    async fn new_streams(&self, peer: PeerId, count: usize) -> Result<Value, String> {
        let mut times = Vec::with_capacity(count);
        let cpu = cpu_seconds();
        for _ in 0..count {
            let start = Instant::now();
            let mut stream = self.open(peer, protocols::ECHO).await?;
            round_trip(&mut stream, &mut [7; 32]).await?;
            times.push(start.elapsed());
            stream.close().await.map_err(text)?;
        }
        Ok(percentiles(times, cpu))
    }

    async fn redial(&self, address: Multiaddr, count: usize) -> Result<Value, String> {
        let mut times = Vec::with_capacity(count);
        let cpu = cpu_seconds();
        for _ in 0..count {
            let start = Instant::now();
            let peer = self.connect(address.clone(), false).await?;
            let mut stream = self.open(peer, protocols::ECHO).await?;
            round_trip(&mut stream, &mut [7; 32]).await?;
            times.push(start.elapsed());
            stream.close().await.map_err(text)?;
            self.disconnect(peer).await?;
        }
        Ok(percentiles(times, cpu))
    }
}

/// The other side's answer to half-close and hold.
async fn counted(mut stream: Stream) -> Result<Value, String> {
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.map_err(text)?;
    match <[u8; 9]>::try_from(answer) {
        Ok([count @ .., intact]) => Ok(json!({ "counted": u64::from_be_bytes(count), "intact": intact == 1 })),
        Err(answer) => Err(format!("an answer of {} bytes", answer.len())),
    }
}

async fn round_trip(stream: &mut Stream, message: &mut [u8]) -> Result<(), String> {
    stream.write_all(message).await.map_err(text)?;
    stream.flush().await.map_err(text)?;
    stream.read_exact(message).await.map_err(text)
}

async fn echo(mut stream: Stream, size: usize, count: usize) -> Result<Value, String> {
    let mut message = vec![7; size];
    let mut times = Vec::with_capacity(count);
    round_trip(&mut stream, &mut message).await?;
    let cpu = cpu_seconds();
    for _ in 0..count {
        let start = Instant::now();
        round_trip(&mut stream, &mut message).await?;
        times.push(start.elapsed());
    }
    let mut fields = percentiles(times, cpu);
    fields["size"] = size.into();
    stream.close().await.map_err(text)?;
    Ok(fields)
}

fn percentiles(mut times: Vec<Duration>, cpu_before: f64) -> Value {
    let cpu = cpu_seconds() - cpu_before;
    times.sort();
    let at = |share: f64| times.get((times.len() as f64 * share) as usize).map(|time| time.as_secs_f64() * 1e6);
    json!({ "count": times.len(), "p50": at(0.5), "p95": at(0.95), "cpu_seconds": cpu })
}

/// Measure against a peer that serves the same protocols; one line `bench` per measurement and round.
pub async fn bench(hands: Hands, options: Options, ended: mpsc::Sender<Result<(), String>>) {
    let target = options.dial.expect("bench has an address").to_string();
    let bytes = options.megabytes * 1_000_000;
    let connect = json!({ "do": "connect", "addr": target });
    let orders = [
        json!({ "do": "perf", "upload": bytes, "write": 65_536 }),
        json!({ "do": "perf", "upload": bytes / 4, "write": 4096 }),
        json!({ "do": "perf", "download": bytes }),
        json!({ "do": "echo", "size": 32, "count": 2000 }),
        json!({ "do": "new-stream", "count": 200 }),
    ];
    let redial = json!({ "do": "redial", "addr": target, "count": 50 });
    let result = async {
        hands.act(&connect).await?;
        for round in 0..options.rounds {
            for order in &orders {
                measure(&hands, order, round).await?;
            }
        }
        hands.act(&json!({ "do": "disconnect" })).await?;
        for round in 0..options.rounds {
            measure(&hands, &redial, round).await?;
        }
        Ok(())
    };
    let result = result.await;
    ended.send(result).await.ok();
}

async fn measure(hands: &Hands, order: &Value, round: u32) -> Result<(), String> {
    let mut fields = hands.act(order).await?;
    fields["bench"] = order["do"].clone();
    fields["round"] = round.into();
    for (bytes, seconds, rate) in
        [("upload", "upload_seconds", "upload_mb_per_s"), ("received", "download_seconds", "download_mb_per_s")]
    {
        if let (Some(bytes), Some(seconds)) = (fields[bytes].as_f64(), fields[seconds].as_f64()) {
            if bytes > 0.0 {
                fields[rate] = (bytes / seconds / 1e6).into();
            }
        }
    }
    report("bench", fields);
    Ok(())
}
