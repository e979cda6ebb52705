//! The Kaspa stream `/kaspad/transport/1.0.0`: gRPC on HTTP/2 by tonic, in either role, with the settings of the
//! reference overlay, and enough of a Kaspa node on it to shake hands and to be pinged.
//!
//! The messages are declared by hand: kaspa-p2p-lib takes TCP addresses only (its `Router` and `ConnectionHandler` can't
//! be built on another stream), and brings kaspad's consensus crates with it, many times what the rest costs to compile.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use libp2p::{PeerId, Stream, StreamProtocol};
use prost::Message;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt};
use tonic::body::Body;
use tonic::codec::CompressionEncoding::Gzip;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;
use tower::Service;

use crate::report::{chain, report};

pub const PROTOCOL: StreamProtocol = StreamProtocol::new("/kaspad/transport/1.0.0");
const PATH: PathAndQuery = PathAndQuery::from_static("/protowire.P2P/MessageStream");
const ORIGIN: &str = "http://kaspa.libp2p";

const STREAM_WINDOW: u32 = 8 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
const MAX_FRAME: u32 = 1 << 20;
const MAX_HEADER_LIST: u32 = 64 << 10;
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_MESSAGE: usize = 256 << 20;

const VERSION_TIMEOUT: Duration = Duration::from_secs(8);
const READY_TIMEOUT: Duration = Duration::from_secs(12);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// For the other side to read what was said last, and to end its side too.
const END_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Clone, PartialEq, Message)]
pub struct KaspadMessage {
    #[prost(uint32, tag = "101")]
    pub response_id: u32,
    #[prost(uint32, tag = "102")]
    pub request_id: u32,
    #[prost(oneof = "Payload", tags = "1, 6, 15, 16, 17, 19, 20, 22, 50")]
    pub payload: Option<Payload>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Payload {
    #[prost(message, tag = "1")]
    Addresses(Addresses),
    #[prost(message, tag = "6")]
    RequestAddresses(Empty),
    #[prost(message, tag = "15")]
    InvTransactions(InvTransactions),
    #[prost(message, tag = "16")]
    Ping(Nonce),
    #[prost(message, tag = "17")]
    Pong(Nonce),
    #[prost(message, tag = "19")]
    Verack(Empty),
    #[prost(message, tag = "20")]
    Version(Version),
    #[prost(message, tag = "22")]
    Reject(Reject),
    #[prost(message, tag = "50")]
    Ready(Empty),
}

#[derive(Clone, PartialEq, Message)]
pub struct Empty {}

#[derive(Clone, PartialEq, Message)]
pub struct Nonce {
    #[prost(uint64, tag = "1")]
    pub nonce: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct Reject {
    #[prost(string, tag = "1")]
    pub reason: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct NetAddress {
    #[prost(int64, tag = "1")]
    pub timestamp: i64,
    #[prost(bytes = "vec", tag = "3")]
    pub ip: Vec<u8>,
    #[prost(uint32, tag = "4")]
    pub port: u32,
}

#[derive(Clone, PartialEq, Message)]
pub struct Addresses {
    #[prost(message, repeated, tag = "1")]
    pub list: Vec<NetAddress>,
}

#[derive(Clone, PartialEq, Message)]
pub struct TransactionId {
    #[prost(bytes = "vec", tag = "1")]
    pub bytes: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub struct InvTransactions {
    #[prost(message, repeated, tag = "1")]
    pub ids: Vec<TransactionId>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Version {
    #[prost(uint32, tag = "1")]
    pub protocol_version: u32,
    #[prost(uint64, tag = "2")]
    pub services: u64,
    #[prost(int64, tag = "3")]
    pub timestamp: i64,
    #[prost(bytes = "vec", tag = "5")]
    pub id: Vec<u8>,
    #[prost(string, tag = "6")]
    pub user_agent: String,
    #[prost(bool, tag = "8")]
    pub disable_relay_tx: bool,
    #[prost(string, tag = "10")]
    pub network: String,
}

/// What this node says of itself, and whom it accepts.
#[derive(Clone)]
pub struct Settings {
    pub network: String,
    pub version: u32,
    pub oldest: u32,
    pub gzip: bool,
    pub id: Vec<u8>,
}

impl Default for Settings {
    fn default() -> Self {
        // Unique among processes, which is all that a node id is for.
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos() as u64;
        let id = (u128::from(nanos) << 64) | u128::from(std::process::id());
        Self { network: "kaspa-simnet".to_owned(), version: 11, oldest: 9, gzip: true, id: id.to_be_bytes().to_vec() }
    }
}

/// An order to a running Kaspa session.
pub enum Order {
    /// Ping the other node; answered with the round trip in seconds.
    Ping(oneshot::Sender<f64>),
    /// Send inventories: how many messages, of how many transaction ids each. Answered when they are queued.
    Send(u32, usize, oneshot::Sender<u64>),
    /// End this side.
    Close,
}

/// The Kaspa sessions that run, by peer; the newest if there are several.
#[derive(Clone)]
pub struct Kaspa {
    settings: Arc<Settings>,
    sessions: Arc<Mutex<HashMap<PeerId, mpsc::Sender<Order>>>>,
    incoming: mpsc::Sender<io::Result<KaspaIo>>,
}

/// A libp2p stream as tonic wants it.
pub struct KaspaIo {
    peer: PeerId,
    stream: Compat<Stream>,
}

impl Connected for KaspaIo {
    type ConnectInfo = PeerId;

    fn connect_info(&self) -> PeerId {
        self.peer
    }
}

impl AsyncRead for KaspaIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for KaspaIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Kaspa {
    /// Start the HTTP/2 server that takes all inbound Kaspa streams.
    pub fn start(settings: Settings) -> Self {
        let (incoming, accepted) = mpsc::channel(16);
        let kaspa = Self { settings: Arc::new(settings), sessions: Arc::default(), incoming };
        let server = tonic::transport::Server::builder()
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .http2_max_header_list_size(MAX_HEADER_LIST)
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .serve_with_incoming(Server(kaspa.clone()), ReceiverStream::new(accepted));
        tokio::spawn(async move {
            if let Err(error) = server.await {
                report("kaspa-server-failed", json!({ "error": chain(&error) }));
            }
        });
        kaspa
    }

    /// Be the HTTP/2 server on a stream.
    pub async fn serve(&self, peer: PeerId, stream: Stream) {
        report("kaspa-stream", json!({ "peer": peer.to_string(), "role": "server" }));
        let io = KaspaIo { peer, stream: stream.compat() };
        // The receiving end lives as long as the server, which ends with the process.
        self.incoming.send(Ok(io)).await.ok();
    }

    /// Be the HTTP/2 client on a stream; returns when the handshake is done.
    pub async fn connect(&self, peer: PeerId, stream: Stream) -> Result<Value, String> {
        report("kaspa-stream", json!({ "peer": peer.to_string(), "role": "client" }));
        let mut io = Some(TokioIo::new(stream.compat()));
        let connector = tower::service_fn(move |_| {
            let io = io.take().ok_or_else(|| io::Error::other("the stream is used up"));
            async move { io }
        });
        let channel = tonic::transport::Endpoint::from_static(ORIGIN)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .http2_max_header_list_size(MAX_HEADER_LIST)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .connect_with_connector(connector)
            .await
            .map_err(|error| chain(&error))?;
        let mut client =
            tonic::client::Grpc::new(channel).max_decoding_message_size(MAX_MESSAGE).accept_compressed(Gzip);
        if self.settings.gzip {
            client = client.send_compressed(Gzip);
        }
        client.ready().await.map_err(|error| chain(&error))?;
        let (outgoing, receiver) = mpsc::channel(256);
        let codec: ProstCodec<KaspadMessage, KaspadMessage> = ProstCodec::default();
        let response = client.streaming(Request::new(ReceiverStream::new(receiver)), PATH, codec).await;
        let response = response.map_err(|status| status_text(&status))?;
        let encoding = response.metadata().get("grpc-encoding").map(|value| format!("{value:?}"));
        let (ready, is_ready) = oneshot::channel();
        let session = Session { kaspa: self.clone(), peer, role: "client", outgoing };
        tokio::spawn(session.run(response.into_inner(), Some(ready)));
        let mut fields = is_ready.await.map_err(|_| "the session ended without a word".to_owned())??;
        fields["encoding"] = json!(encoding);
        Ok(fields)
    }

    /// Hand an order to the session with a peer.
    pub async fn order(&self, peer: PeerId, order: Order) -> Result<(), String> {
        let session = self.sessions.lock().expect("not poisoned").get(&peer).cloned();
        let session = session.ok_or("no Kaspa session with this peer")?;
        session.send(order).await.map_err(|_| "the session ended".to_owned())
    }
}

fn status_text(status: &Status) -> String {
    format!("gRPC status {}: {}", status.code() as i32, status.message())
}

/// The gRPC service, as tonic's generated code would be.
#[derive(Clone)]
struct Server(Kaspa);

type MessageStream = Pin<Box<dyn tokio_stream::Stream<Item = Result<KaspadMessage, Status>> + Send>>;
type Answer<T> = Pin<Box<dyn Future<Output = T> + Send>>;

impl Service<http::Request<Body>> for Server {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Answer<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let kaspa = self.0.clone();
        Box::pin(async move {
            if request.uri().path() != PATH.as_str() {
                return Ok(Status::unimplemented("").into_http());
            }
            let codec: ProstCodec<KaspadMessage, KaspadMessage> = ProstCodec::default();
            let mut grpc =
                tonic::server::Grpc::new(codec).accept_compressed(Gzip).max_decoding_message_size(MAX_MESSAGE);
            if kaspa.settings.gzip {
                grpc = grpc.send_compressed(Gzip);
            }
            Ok(grpc.streaming(Call(kaspa), request).await)
        })
    }
}

struct Call(Kaspa);

impl Service<Request<Streaming<KaspadMessage>>> for Call {
    type Response = Response<MessageStream>;
    type Error = Status;
    type Future = Answer<Result<Self::Response, Status>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Streaming<KaspadMessage>>) -> Self::Future {
        let kaspa = self.0.clone();
        Box::pin(async move {
            let peer =
                *request.extensions().get::<PeerId>().ok_or_else(|| Status::internal("whose stream is this?"))?;
            let header =
                |name: &str| request.metadata().get(name).map(|value| value.to_str().unwrap_or("?").to_owned());
            report(
                "kaspa-request",
                json!({
                    "peer": peer.to_string(), "encoding": header("grpc-encoding"),
                    "accept_encoding": header("grpc-accept-encoding"), "user_agent": header("user-agent"),
                }),
            );
            let (outgoing, receiver) = mpsc::channel(256);
            let session = Session { kaspa, peer, role: "server", outgoing };
            tokio::spawn(session.run(request.into_inner(), None));
            Ok(Response::new(Box::pin(ReceiverStream::new(receiver).map(Ok)) as MessageStream))
        })
    }
}

/// One Kaspa connection, whoever is the HTTP/2 client.
struct Session {
    kaspa: Kaspa,
    peer: PeerId,
    role: &'static str,
    outgoing: mpsc::Sender<KaspadMessage>,
}

/// What came in, by kind.
#[derive(Default)]
struct Counts {
    messages: u64,
    bytes: u64,
    inventories: u64,
    transaction_ids: u64,
    addresses: u64,
    pings: u64,
    others: u64,
}

impl Session {
    async fn run(self, mut incoming: Streaming<KaspadMessage>, ready: Option<oneshot::Sender<Result<Value, String>>>) {
        let result = self.handshake(&mut incoming).await;
        let (orders, mut receiver) = mpsc::channel(16);
        if result.is_ok() {
            self.kaspa.sessions.lock().expect("not poisoned").insert(self.peer, orders.clone());
        }
        match &result {
            Ok(fields) => self.report("kaspa-ready", fields.clone()),
            Err(error) => self.report("kaspa-handshake-failed", json!({ "error": error })),
        }
        let failed = result.is_err();
        if let Some(ready) = ready {
            ready.send(result).ok();
        }
        if failed {
            return self.end(incoming).await;
        }
        let mut counts = Counts::default();
        let end = self.converse(&mut incoming, &mut receiver, &mut counts).await;
        {
            let mut sessions = self.kaspa.sessions.lock().expect("not poisoned");
            if sessions.get(&self.peer).is_some_and(|newest| newest.same_channel(&orders)) {
                sessions.remove(&self.peer);
            }
        }
        self.report(
            "kaspa-closed",
            json!({
                "end": end, "messages": counts.messages, "bytes": counts.bytes, "inventories": counts.inventories,
                "transaction_ids": counts.transaction_ids, "addresses": counts.addresses, "pings": counts.pings,
                "others": counts.others,
            }),
        );
        self.end(incoming).await;
    }

    /// End in order: a call that is merely dropped is cancelled, and what was said last is lost with it.
    async fn end(self, mut incoming: Streaming<KaspadMessage>) {
        drop(self.outgoing);
        let rest = async { while let Ok(Some(_)) = incoming.message().await {} };
        tokio::time::timeout(END_TIMEOUT, rest).await.ok();
    }

    fn report(&self, event: &str, mut fields: Value) {
        fields["peer"] = self.peer.to_string().into();
        fields["role"] = self.role.into();
        report(event, fields);
    }

    async fn send(&self, payload: Payload) -> Result<(), String> {
        self.send_message(KaspadMessage { response_id: 0, request_id: 0, payload: Some(payload) }).await
    }

    async fn send_message(&self, message: KaspadMessage) -> Result<(), String> {
        self.outgoing.send(message).await.map_err(|_| "the stream ended".to_owned())
    }

    /// Version, Verack and Ready both ways, in kaspad's order and with the reference overlay's patience.
    async fn handshake(&self, incoming: &mut Streaming<KaspadMessage>) -> Result<Value, String> {
        let settings = &self.kaspa.settings;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_millis() as i64;
        let own = Version {
            protocol_version: settings.version,
            services: 0,
            timestamp: now,
            id: settings.id.clone(),
            user_agent: "/kas-interop-peer:0.1.0/".to_owned(),
            disable_relay_tx: false,
            network: settings.network.clone(),
        };
        self.send(Payload::Version(own)).await?;
        let (mut version, mut verack) = (None, false);
        let versions = async {
            while version.is_none() || !verack {
                match next(incoming).await? {
                    Payload::Version(theirs) if version.is_none() => {
                        version = Some(theirs);
                        self.send(Payload::Verack(Empty {})).await?;
                    }
                    Payload::Verack(_) if !verack => verack = true,
                    other => return Err(unexpected(&other)),
                }
            }
            Ok(())
        };
        tokio::time::timeout(VERSION_TIMEOUT, versions).await.map_err(|_| "no Version and Verack in time")??;
        let theirs = version.expect("the loop ended with one");
        if let Some(reason) = objection(settings, &theirs) {
            self.send(Payload::Reject(Reject { reason: reason.clone() })).await?;
            return Err(reason);
        }
        self.send(Payload::Ready(Empty {})).await?;
        match tokio::time::timeout(READY_TIMEOUT, next(incoming)).await.map_err(|_| "no Ready in time")?? {
            Payload::Ready(_) => Ok(json!({
                "protocol_version": theirs.protocol_version, "user_agent": theirs.user_agent,
                "network": theirs.network, "node_id": hex(&theirs.id), "timestamp": theirs.timestamp,
            })),
            other => Err(unexpected(&other)),
        }
    }

    /// After Ready: as kaspad does, ask for addresses once, and answer what is asked. Returns how it ended.
    async fn converse(
        &self,
        incoming: &mut Streaming<KaspadMessage>,
        orders: &mut mpsc::Receiver<Order>,
        counts: &mut Counts,
    ) -> String {
        let mut pings: HashMap<u64, (Instant, oneshot::Sender<f64>)> = HashMap::new();
        let request =
            KaspadMessage { response_id: 0, request_id: 77, payload: Some(Payload::RequestAddresses(Empty {})) };
        if let Err(error) = self.send_message(request).await {
            return error;
        }
        let deadline = tokio::time::sleep(ANSWER_TIMEOUT);
        tokio::pin!(deadline);
        loop {
            let message = tokio::select! {
                message = incoming.message() => message,
                order = orders.recv() => {
                    match order {
                        Some(Order::Ping(answer)) => {
                            let nonce = counts.messages << 32 | pings.len() as u64 + 1;
                            pings.insert(nonce, (Instant::now(), answer));
                            if let Err(error) = self.send(Payload::Ping(Nonce { nonce })).await { return error }
                        }
                        Some(Order::Send(count, ids, answer)) => {
                            let id = |index: usize| TransactionId { bytes: vec![index as u8; 32] };
                            let message = KaspadMessage {
                                payload: Some(Payload::InvTransactions(InvTransactions { ids: (0..ids).map(id).collect() })),
                                ..KaspadMessage::default()
                            };
                            // In its own task: this one has to go on reading, or two senders would wait for one another.
                            let (size, outgoing) = (message.encoded_len() as u64, self.outgoing.clone());
                            tokio::spawn(async move {
                                for _ in 0..count {
                                    if outgoing.send(message.clone()).await.is_err() { return }
                                }
                                answer.send(size * u64::from(count)).ok();
                            });
                        }
                        Some(Order::Close) | None => return "closed here".to_owned(),
                    }
                    continue;
                }
                () = &mut deadline, if counts.addresses == 0 => return "RequestAddresses was not answered".to_owned(),
            };
            let message = match message {
                Ok(Some(message)) => message,
                Ok(None) => return "end of stream".to_owned(),
                Err(status) => return status_text(&status),
            };
            counts.messages += 1;
            counts.bytes += message.encoded_len() as u64;
            let answered = match message.payload {
                Some(Payload::Ping(nonce)) => {
                    counts.pings += 1;
                    self.send(Payload::Pong(nonce)).await
                }
                Some(Payload::Pong(Nonce { nonce })) => match pings.remove(&nonce) {
                    Some((sent, answer)) => {
                        answer.send(sent.elapsed().as_secs_f64()).ok();
                        Ok(())
                    }
                    None => return "Pong that was not asked for".to_owned(),
                },
                Some(Payload::RequestAddresses(_)) => {
                    let addresses = Some(Payload::Addresses(Addresses::default()));
                    let response_id = message.request_id;
                    self.send_message(KaspadMessage { response_id, request_id: 0, payload: addresses }).await
                }
                Some(Payload::Addresses(addresses)) => {
                    counts.addresses += 1;
                    if counts.addresses > 1 {
                        return "Addresses that were not asked for".to_owned();
                    }
                    let fields = json!({ "count": addresses.list.len(), "response_id": message.response_id });
                    self.report("kaspa-addresses", fields);
                    Ok(())
                }
                Some(Payload::InvTransactions(inventory)) => {
                    counts.inventories += 1;
                    counts.transaction_ids += inventory.ids.len() as u64;
                    Ok(())
                }
                Some(Payload::Reject(Reject { reason })) => return format!("rejected: {reason}"),
                Some(other @ (Payload::Version(_) | Payload::Verack(_) | Payload::Ready(_))) => {
                    return unexpected(&other);
                }
                None => {
                    counts.others += 1;
                    Ok(())
                }
            };
            if let Err(error) = answered {
                return error;
            }
        }
    }
}

async fn next(incoming: &mut Streaming<KaspadMessage>) -> Result<Payload, String> {
    match incoming.message().await {
        Ok(Some(KaspadMessage { payload: Some(Payload::Reject(Reject { reason })), .. })) => {
            Err(format!("rejected: {reason}"))
        }
        Ok(Some(KaspadMessage { payload: Some(payload), .. })) => Ok(payload),
        Ok(Some(_)) => Err("an unknown message during the handshake".to_owned()),
        Ok(None) => Err("the stream ended during the handshake".to_owned()),
        Err(status) => Err(status_text(&status)),
    }
}

fn objection(settings: &Settings, theirs: &Version) -> Option<String> {
    if theirs.network != settings.network {
        Some(format!("network mismatch - local: {}, remote: {}", settings.network, theirs.network))
    } else if theirs.protocol_version < settings.oldest {
        let (local, remote) = (settings.version, theirs.protocol_version);
        Some(format!("P2P protocol version mismatch - local: {local}, remote: {remote}"))
    } else if theirs.id.len() != 16 {
        Some(format!("node id of {} bytes", theirs.id.len()))
    } else {
        None
    }
}

fn unexpected(payload: &Payload) -> String {
    let text = format!("{payload:?}");
    format!("unexpected {}", text.split('(').next().unwrap_or_default())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
