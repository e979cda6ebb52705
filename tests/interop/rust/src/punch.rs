//! A node that reaches another through a relay and then directly (DCUtR). The source of two programs: of the present
//! rust-libp2p, and of the last one that tells the port that others saw.
//!
//! ```text
//! kas-interop-punch reserve RELAY LISTEN      keep a place on RELAY, for whoever dials
//! kas-interop-punch dial CIRCUIT LISTEN       dial through the relay, wait for the direct connection, use it
//! ```
//!
//! It listens on LISTEN, an address with a port, and dials from there. One JSON object per line on stdout, each with a
//! field `event`, and `at`, seconds since the start:
//!
//! | event | |
//! |---|---|
//! | `started`, `listening` | `peer`; `address` |
//! | `candidate` | `address` where somebody saw us |
//! | `reserved` | `address` of the circuit, for `dial` |
//! | `connected`, `closed` | `peer`, `relayed`, `dialed`, `remote`; of the latter `cause` |
//! | `direct` | the first direct connection beside a circuit: `peer`, `remote`, `dialed`, `seconds` since the circuit |
//! | `dcutr` | what the library thinks of it: `peer`, `error` |
//! | `dial-failed` | `error` |
//! | `ping` | `relayed`, `rtt` in seconds |
//! | `echoed` | only by `dial`: on a stream of the direct connection, when the circuit is gone |
//!
//! It exits when stdin closes.

use std::collections::HashMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use libp2p::core::ConnectedPoint;
use libp2p::core::transport::{OrTransport, Transport};
use libp2p::core::upgrade::Version;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::{ConnectionId, NetworkBehaviour, SwarmEvent};
use libp2p::{Multiaddr, PeerId, StreamProtocol, Swarm, dcutr, identify, identity, noise, ping, relay, tcp, yamux};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::mpsc;

const ECHO: StreamProtocol = StreamProtocol::new("/kas-interop/echo/1.0.0");
const PING: Duration = Duration::from_secs(1);
const IDLE: Duration = Duration::from_secs(60);

#[derive(NetworkBehaviour)]
struct Behaviour {
    identify: identify::Behaviour,
    ping: ping::Behaviour,
    relay: relay::client::Behaviour,
    dcutr: dcutr::Behaviour,
    streams: libp2p_stream::Behaviour,
}

pub fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [command, target, listen] = &arguments[..] else {
        eprintln!("usage: kas-interop-punch reserve RELAY LISTEN | dial CIRCUIT LISTEN");
        return ExitCode::from(2);
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime can be built");
    let result = runtime.block_on(run(command == "dial", target, listen));
    runtime.shutdown_timeout(Duration::ZERO);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    }
}

async fn run(dials: bool, target: &str, listen: &str) -> Result<(), Box<dyn std::error::Error>> {
    let target: Multiaddr = target.parse()?;
    let key = identity::Keypair::generate_ed25519();
    let peer = key.public().to_peer_id();
    let (circuits, relay) = relay::client::new(peer);
    let transport = OrTransport::new(circuits, tcp::tokio::Transport::new(tcp::Config::default().nodelay(true)))
        .upgrade(Version::V1Lazy)
        .authenticate(noise::Config::new(&key)?)
        .multiplex(yamux::Config::default())
        .timeout(Duration::from_secs(10))
        .boxed();
    let behaviour = Behaviour {
        identify: identify::Behaviour::new(identify::Config::new("/kas-interop/1.0.0".to_owned(), key.public())),
        ping: ping::Behaviour::new(ping::Config::new().with_interval(PING)),
        relay,
        dcutr: dcutr::Behaviour::new(peer),
        streams: libp2p_stream::Behaviour::new(),
    };
    let config = libp2p::swarm::Config::with_tokio_executor().with_idle_connection_timeout(IDLE);
    let mut swarm = Swarm::new(transport, behaviour, peer, config);
    serve_echo(swarm.behaviour().streams.new_control());
    swarm.listen_on(listen.parse()?)?;
    let via: Multiaddr = target.iter().take_while(|part| *part != Protocol::P2pCircuit).collect();
    let Some(Protocol::P2p(relay)) = via.iter().last() else {
        return Err("the relay's address needs its peer id".into());
    };
    let (used, mut uses) = mpsc::channel(1);
    let (start, states) = (Instant::now(), HashMap::new());
    let mut node = Node { swarm, start, target, via, relay, dials, asked: false, states, used };
    node.report("started", json!({ "peer": peer.to_string() }));
    let mut stdin = BufReader::new(tokio::io::stdin()).lines();
    loop {
        tokio::select! {
            event = node.swarm.select_next_some() => node.on_event(event)?,
            Some(fields) = uses.recv() => node.report("echoed", fields),
            line = stdin.next_line() => if line?.is_none() { return Ok(()) },
        }
    }
}

fn serve_echo(mut control: libp2p_stream::Control) {
    let mut incoming = control.accept(ECHO).expect("it is registered once");
    tokio::spawn(async move {
        while let Some((_, stream)) = incoming.next().await {
            tokio::spawn(async move {
                let (reading, mut writing) = stream.split();
                if futures::io::copy(reading, &mut writing).await.is_ok() {
                    writing.close().await.ok();
                }
            });
        }
    });
}

/// How far it is with a peer that was met on a circuit.
struct Meeting {
    circuit: ConnectionId,
    since: Instant,
    direct: Option<ConnectionId>,
    used: bool,
}

struct Node {
    swarm: Swarm<Behaviour>,
    start: Instant,
    target: Multiaddr,
    via: Multiaddr,
    relay: PeerId,
    dials: bool,
    asked: bool,
    states: HashMap<PeerId, Meeting>,
    used: mpsc::Sender<Value>,
}

impl Node {
    fn report(&self, name: &str, fields: Value) {
        let mut line = json!({ "event": name, "at": self.start.elapsed().as_secs_f64() });
        if let (Value::Object(line), Value::Object(fields)) = (&mut line, fields) {
            line.extend(fields);
        }
        println!("{line}");
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) -> Result<(), Box<dyn std::error::Error>> {
        match event {
            SwarmEvent::NewListenAddr { address, .. } => {
                self.report("listening", json!({ "address": address.to_string() }));
                let mut parts = address.iter();
                let outside = matches!(parts.next(), Some(Protocol::Ip4(ip)) if !ip.is_loopback());
                if outside && parts.all(|part| part != Protocol::P2pCircuit) {
                    self.swarm.dial(self.via.clone())?; // not before: it goes out from the port that we listen on
                }
            }
            SwarmEvent::NewExternalAddrCandidate { address } => {
                self.report("candidate", json!({ "address": address.to_string() }));
            }
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                self.on_connection(peer_id, connection_id, &endpoint);
            }
            SwarmEvent::ConnectionClosed { peer_id, endpoint, cause, .. } => {
                let mut fields = describe(peer_id, &endpoint);
                fields["cause"] = json!(cause.map(|cause| format!("{cause:?}")));
                self.report("closed", fields);
            }
            SwarmEvent::OutgoingConnectionError { error, .. } => {
                self.report("dial-failed", json!({ "error": format!("{error:?}") }));
            }
            SwarmEvent::Behaviour(BehaviourEvent::Identify(identify::Event::Received { peer_id, .. }))
                if peer_id == self.relay && !self.asked =>
            {
                self.asked = true; // a relay may tell about itself again
                if self.dials {
                    self.swarm.dial(self.target.clone())?;
                } else {
                    self.swarm.listen_on(self.via.clone().with(Protocol::P2pCircuit))?;
                }
            }
            SwarmEvent::Behaviour(BehaviourEvent::Relay(relay::client::Event::ReservationReqAccepted { .. })) => {
                let me = *self.swarm.local_peer_id();
                let address = self.via.clone().with(Protocol::P2pCircuit).with(Protocol::P2p(me));
                self.report("reserved", json!({ "address": address.to_string() }));
            }
            SwarmEvent::Behaviour(BehaviourEvent::Dcutr(event)) => {
                let error = event.result.err().map(|error| format!("{error:?}"));
                self.report("dcutr", json!({ "peer": event.remote_peer_id.to_string(), "error": error }));
            }
            SwarmEvent::Behaviour(BehaviourEvent::Ping(ping::Event { peer, connection, result: Ok(rtt) })) => {
                self.on_ping(peer, connection, rtt);
            }
            _ => {}
        }
        Ok(())
    }

    fn on_connection(&mut self, peer: PeerId, connection: ConnectionId, endpoint: &ConnectedPoint) {
        let fields = describe(peer, endpoint);
        self.report("connected", fields.clone());
        if endpoint.is_relayed() {
            let meeting = Meeting { circuit: connection, since: Instant::now(), direct: None, used: false };
            self.states.entry(peer).or_insert(meeting);
        } else if let Some(meeting) = self.states.get_mut(&peer).filter(|meeting| meeting.direct.is_none()) {
            meeting.direct = Some(connection);
            let mut fields = fields;
            fields["seconds"] = meeting.since.elapsed().as_secs_f64().into();
            self.report("direct", fields);
        }
    }

    /// The first answer on the direct connection says that it works at both ends: then the circuit can go.
    fn on_ping(&mut self, peer: PeerId, connection: ConnectionId, rtt: Duration) {
        let Some(meeting) = self.states.get_mut(&peer) else { return };
        let direct = meeting.direct == Some(connection);
        if direct && self.dials && !meeting.used {
            meeting.used = true;
            self.swarm.close_connection(meeting.circuit);
            tokio::spawn(echo(self.swarm.behaviour().streams.new_control(), peer, self.used.clone()));
        }
        self.report("ping", json!({ "relayed": !direct, "rtt": rtt.as_secs_f64() }));
    }
}

fn describe(peer: PeerId, endpoint: &ConnectedPoint) -> Value {
    json!({
        "peer": peer.to_string(), "relayed": endpoint.is_relayed(), "dialed": endpoint.is_dialer(),
        "remote": endpoint.get_remote_address().to_string(),
    })
}

async fn echo(mut control: libp2p_stream::Control, peer: PeerId, used: mpsc::Sender<Value>) {
    let result = async {
        // The circuit is on its way out: a stream may still land on it once.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let mut stream = control.open_stream(peer, ECHO).await.map_err(|error| error.to_string())?;
        let mut answer = [0; 5];
        stream.write_all(b"kaspa").await.map_err(|error| error.to_string())?;
        stream.close().await.map_err(|error| error.to_string())?;
        stream.read_exact(&mut answer).await.map_err(|error| error.to_string())?;
        Ok::<bool, String>(&answer == b"kaspa")
    };
    let result = result.await;
    used.send(json!({ "intact": result == Ok(true), "error": result.err() })).await.ok();
}
