//! The swarm and its loop. Orders run as tasks of their own ([`crate::actions`]) and ask the loop for what only it can do.

use std::collections::HashMap;
use std::time::Duration;

use futures::StreamExt;
use libp2p::autonat::{v1, v2};
use libp2p::core::transport::OrTransport;
use libp2p::core::upgrade::Version;
use libp2p::core::{ConnectedPoint, PeerRecord};
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError, NetworkBehaviour, SwarmEvent};
use libp2p::{
    Multiaddr, PeerId, StreamProtocol, Swarm, Transport, identify, identity, multiaddr, noise, ping, relay, tcp, yamux,
};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::{mpsc, oneshot, watch};

use crate::actions::{self, Hands};
use crate::kaspa::{self, Kaspa};
use crate::report::{chain, report, text};
use crate::{Options, autonat, protocols};

/// Seconds for Noise and yamux, as in the library's own examples.
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(NetworkBehaviour)]
struct Behaviour {
    identify: identify::Behaviour,
    ping: ping::Behaviour,
    relay: Toggle<relay::Behaviour>,
    relay_client: relay::client::Behaviour,
    autonat_v1: Toggle<v1::Behaviour>,
    autonat_v2_server: Toggle<v2::server::Behaviour>,
    autonat_v2_client: Toggle<v2::client::Behaviour>,
    streams: libp2p_stream::Behaviour,
}

/// How a relay's limits differ from the library's.
#[derive(Clone, Default)]
pub struct RelayLimits {
    pub open: bool,
    pub bytes: Option<u64>,
    pub seconds: Option<u64>,
    pub reservation: Option<u64>,
}

impl RelayLimits {
    fn config(&self) -> relay::Config {
        let mut config = relay::Config::default();
        if self.open {
            config.reservation_rate_limiters.clear();
            config.circuit_src_rate_limiters.clear();
            config.max_reservations = usize::MAX;
            config.max_reservations_per_peer = usize::MAX;
            config.max_circuits = usize::MAX;
            config.max_circuits_per_peer = usize::MAX;
            config.max_circuit_bytes = 0;
            config.max_circuit_duration = Duration::from_secs(u32::MAX.into());
        }
        config.max_circuit_bytes = self.bytes.unwrap_or(config.max_circuit_bytes);
        config.max_circuit_duration = self.seconds.map_or(config.max_circuit_duration, Duration::from_secs);
        config.reservation_duration = self.reservation.map_or(config.reservation_duration, Duration::from_secs);
        config
    }
}

pub type Reply<T> = oneshot::Sender<Result<T, String>>;

/// What only the loop can do.
pub enum Ask {
    Dial {
        address: Multiaddr,
        new_port: bool,
        reply: Reply<PeerId>,
    },
    /// Close all connections to a peer; answered when they are gone.
    Disconnect {
        peer: PeerId,
        reply: Reply<()>,
    },
    Listen {
        address: Multiaddr,
        reply: Reply<()>,
    },
    Push {
        peer: PeerId,
    },
    /// The peers there are connections to.
    Peers {
        reply: oneshot::Sender<Vec<PeerId>>,
    },
}

/// Run until stdin closes, or until the benchmark is done.
///
/// Orders (`do`), with their fields; `peer` may be left out when there is exactly one. A circuit address works in
/// `connect` and, to reserve, in `listen`:
///
/// | order | fields | answer |
/// |---|---|---|
/// | `connect` | `addr`, `new_port` | `peer`, `seconds` |
/// | `disconnect` | `peer` | |
/// | `listen` | `addr` | (and the event `listening`) |
/// | `push` | `peer` | identify is pushed |
/// | `open` | `protocol` | whether the peer speaks it: `answer`, `bytes` read after one byte was written |
/// | `ping` | | `rtt` in seconds |
/// | `perf` | `upload`, `download`, `write` | seconds and bytes of both, `cpu_seconds` of this process |
/// | `echo` | `size`, `count` | `p50`, `p95` in microseconds, `cpu_seconds` |
/// | `new-stream` | `count` | `p50`, `p95`: from opening to the first echo |
/// | `redial` | `addr`, `count` | `p50`, `p95`: from the dial to the first echo on the new connection |
/// | `streams` | `count`, `size` | that many echo streams at once |
/// | `half-close` | `bytes`, `write` | what the peer counted |
/// | `first-close` | `bytes` | the peer ends its direction first |
/// | `bulk` | `up`, `down`, `write`; `stall_ms`, `pause_us`, `chunk` and the same with `peer_` | what arrived here |
/// | `fill` | `protocol`, `quiet_ms`, `most` | writes until nothing more is taken: `stream`, `bytes` |
/// | `finish` | `stream` | ends the filled stream; what the peer counted |
/// | `release` | | lets `hold` streams be read |
/// | `reset` | | resets an echo stream after one byte |
/// | `be-reset` | | the kind of error that a reset by the peer is here |
/// | `kaspa` | | opens a Kaspa stream as HTTP/2 client: what the peer's Version said |
/// | `kaspa-as-server` | | opens a Kaspa stream and is the HTTP/2 *server* on it, as after a hole punch |
/// | `kaspa-ping` | | `rtt` |
/// | `kaspa-send` | `count`, `ids` | sends inventories: `bytes` |
/// | `kaspa-close` | | ends the Kaspa stream |
pub async fn run(options: Options) -> Result<(), String> {
    let mut swarm = build(&options)?;
    let (asks, mut asked) = mpsc::channel(16);
    let (release, released) = watch::channel(0);
    let kaspa = Kaspa::start(options.kaspa.clone());
    let hands = Hands::new(swarm.behaviour().streams.new_control(), asks, kaspa.clone(), release);
    serve(&swarm, kaspa, released);
    for address in &options.listen {
        swarm.listen_on(address.clone()).map_err(|error| chain(&error))?;
    }
    report("started", json!({ "peer": swarm.local_peer_id().to_string(), "version": env!("CARGO_PKG_VERSION") }));

    let (ended, mut end) = mpsc::channel(1);
    if options.bench {
        tokio::spawn(actions::bench(hands, options, ended));
    } else {
        if let Some(address) = options.dial {
            let order = json!({ "id": 0, "do": "connect", "addr": address.to_string() });
            tokio::spawn(actions::obey(hands.clone(), order));
        }
        tokio::spawn(read_orders(hands, ended));
    }

    let mut node = Node { swarm, dials: HashMap::new(), closing: HashMap::new() };
    loop {
        tokio::select! {
            event = node.swarm.select_next_some() => node.on_event(event),
            Some(ask) = asked.recv() => node.on_ask(ask),
            result = end.recv() => return result.unwrap_or(Ok(())),
        }
    }
}

fn build(options: &Options) -> Result<Swarm<Behaviour>, String> {
    let version = |lazy| if lazy { Version::V1Lazy } else { Version::V1 };
    let mut muxer = yamux::Config::default();
    muxer.set_max_num_streams(options.max_streams);
    let peer = options.key.public().to_peer_id();
    let (circuits, relay_client) = relay::client::new(peer);
    let transport = OrTransport::new(circuits, tcp::tokio::Transport::new(tcp::Config::default().nodelay(true)))
        .upgrade(version(options.lazy_connection))
        .authenticate(noise::Config::new(&options.key).map_err(text)?)
        .multiplex(muxer)
        .timeout(UPGRADE_TIMEOUT)
        .boxed();
    let mut identify = if options.signed_record {
        identify::Config::new_with_signed_peer_record(options.protocol_version.clone(), &options.key)
    } else {
        identify::Config::new(options.protocol_version.clone(), options.key.public())
    };
    if let Some(agent) = &options.agent {
        identify = identify.with_agent_version(agent.clone());
    }
    let behaviour = Behaviour {
        identify: identify::Behaviour::new(identify.with_push_listen_addr_updates(options.push)),
        ping: ping::Behaviour::new(ping::Config::new().with_interval(options.ping_interval)),
        relay: options.relay.as_ref().map(|limits| relay::Behaviour::new(peer, limits.config())).into(),
        relay_client,
        autonat_v1: options.autonat.v1.then(|| v1::Behaviour::new(peer, options.autonat.v1_config())).into(),
        autonat_v2_server: options.autonat.v2_server.then(v2::server::Behaviour::default).into(),
        autonat_v2_client: options.autonat.v2_client.then(v2::client::Behaviour::default).into(),
        streams: libp2p_stream::Behaviour::new(),
    };
    let config = libp2p::swarm::Config::with_tokio_executor()
        .with_substream_upgrade_protocol_override(version(options.lazy_streams))
        .with_idle_connection_timeout(options.idle_timeout);
    Ok(Swarm::new(transport, behaviour, peer, config))
}

/// Accept streams of every protocol, each in its own task.
fn serve(swarm: &Swarm<Behaviour>, kaspa: Kaspa, released: watch::Receiver<u64>) {
    let mut control = swarm.behaviour().streams.new_control();
    let test_protocols = [
        protocols::PERF,
        protocols::ECHO,
        protocols::HALF_CLOSE,
        protocols::FIRST_CLOSE,
        protocols::BULK,
        protocols::HOLD,
        protocols::RESET,
    ];
    let mut accept = move |protocol: StreamProtocol| control.accept(protocol).expect("each is registered once");
    for protocol in test_protocols {
        let mut incoming = accept(protocol.clone());
        let released = released.clone();
        tokio::spawn(async move {
            while let Some((peer, stream)) = incoming.next().await {
                tokio::spawn(protocols::serve(protocol.clone(), peer, stream, released.clone()));
            }
        });
    }
    let mut incoming = accept(kaspa::PROTOCOL);
    tokio::spawn(async move {
        while let Some((peer, stream)) = incoming.next().await {
            kaspa.serve(peer, stream).await;
        }
    });
}

async fn read_orders(hands: Hands, ended: mpsc::Sender<Result<(), String>>) {
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let result = loop {
        match lines.next_line().await {
            Ok(Some(line)) => match serde_json::from_str(&line) {
                Ok(order) => drop(tokio::spawn(actions::obey(hands.clone(), order))),
                Err(error) => report("failed", json!({ "error": text(error), "line": line })),
            },
            Ok(None) => break Ok(()),
            Err(error) => break Err(text(error)),
        }
    };
    ended.send(result).await.ok();
}

struct Node {
    swarm: Swarm<Behaviour>,
    dials: HashMap<ConnectionId, Reply<PeerId>>,
    closing: HashMap<PeerId, Vec<Reply<()>>>,
}

impl Node {
    fn on_ask(&mut self, ask: Ask) {
        match ask {
            Ask::Dial { address, new_port, reply } => {
                let options = dial_options(address, new_port);
                let connection = options.connection_id();
                match self.swarm.dial(options) {
                    Ok(()) => drop(self.dials.insert(connection, reply)),
                    Err(error) => drop(reply.send(Err(chain(&error)))),
                }
            }
            Ask::Disconnect { peer, reply } => match self.swarm.disconnect_peer_id(peer) {
                Ok(()) => self.closing.entry(peer).or_default().push(reply),
                Err(()) => drop(reply.send(Err("not connected".to_owned()))),
            },
            Ask::Listen { address, reply } => {
                let result = self.swarm.listen_on(address).map(drop).map_err(|error| chain(&error));
                reply.send(result).ok();
            }
            Ask::Push { peer } => self.swarm.behaviour_mut().identify.push([peer]),
            Ask::Peers { reply } => drop(reply.send(self.swarm.connected_peers().copied().collect())),
        }
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::NewListenAddr { address, .. } => {
                if self.swarm.behaviour().relay.is_enabled() {
                    // What it tells in a reservation, and without which it does not offer to be a relay.
                    self.swarm.add_external_address(address.clone());
                }
                let address = address.with(multiaddr::Protocol::P2p(*self.swarm.local_peer_id()));
                report("listening", json!({ "address": address.to_string() }));
            }
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, established_in, .. } => {
                let (direction, local, remote) = match &endpoint {
                    ConnectedPoint::Dialer { address, .. } => ("outbound", None, address),
                    ConnectedPoint::Listener { local_addr, send_back_addr } => {
                        ("inbound", Some(local_addr), send_back_addr)
                    }
                };
                report(
                    "connected",
                    json!({
                        "peer": peer_id.to_string(), "connection": connection_id.to_string(), "direction": direction,
                        "remote": remote.to_string(), "local": local.map(Multiaddr::to_string),
                        "seconds": established_in.as_secs_f64(),
                    }),
                );
                if let Some(reply) = self.dials.remove(&connection_id) {
                    reply.send(Ok(peer_id)).ok();
                }
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, num_established, cause, .. } => {
                report(
                    "disconnected",
                    json!({
                        "peer": peer_id.to_string(), "connection": connection_id.to_string(), "left": num_established,
                        "cause": cause.map(|cause| chain(&cause)),
                    }),
                );
                if num_established == 0 {
                    for reply in self.closing.remove(&peer_id).unwrap_or_default() {
                        reply.send(Ok(())).ok();
                    }
                }
            }
            SwarmEvent::OutgoingConnectionError { connection_id, error, .. } => {
                let kind = match &error {
                    DialError::WrongPeerId { .. } => "wrong-peer-id",
                    DialError::Transport(_) => "transport",
                    _ => "other",
                };
                let error = chain(&error);
                report("dial-failed", json!({ "kind": kind, "error": error }));
                if let Some(reply) = self.dials.remove(&connection_id) {
                    reply.send(Err(error)).ok();
                }
            }
            SwarmEvent::IncomingConnectionError { send_back_addr, error, .. } => {
                report("inbound-failed", json!({ "remote": send_back_addr.to_string(), "error": chain(&error) }));
            }
            SwarmEvent::NewExternalAddrCandidate { address } => {
                report("external-candidate", json!({ "address": address.to_string() }));
            }
            SwarmEvent::ListenerError { error, .. } => report("listener-failed", json!({ "error": text(error) })),
            SwarmEvent::ListenerClosed { reason: Err(error), .. } => {
                report("listener-failed", json!({ "error": chain(&error) }));
            }
            SwarmEvent::Behaviour(BehaviourEvent::AutonatV1(event)) => {
                let behaviour = self.swarm.behaviour().autonat_v1.as_ref();
                autonat::on_v1(event, behaviour.map_or(0, v1::Behaviour::confidence));
            }
            SwarmEvent::Behaviour(event) => on_behaviour(event),
            _ => {}
        }
    }
}

fn dial_options(address: Multiaddr, new_port: bool) -> DialOpts {
    match address.iter().last() {
        Some(multiaddr::Protocol::P2p(peer)) => {
            let options = DialOpts::peer_id(peer).condition(PeerCondition::Always).addresses(vec![address]);
            if new_port { options.allocate_new_port().build() } else { options.build() }
        }
        _ => {
            let options = DialOpts::unknown_peer_id().address(address);
            if new_port { options.allocate_new_port().build() } else { options.build() }
        }
    }
}

fn on_behaviour(event: BehaviourEvent) {
    match event {
        BehaviourEvent::Ping(ping::Event { peer, result, .. }) => {
            let fields = match result {
                Ok(rtt) => json!({ "peer": peer.to_string(), "rtt": rtt.as_secs_f64() }),
                Err(error) => json!({ "peer": peer.to_string(), "error": chain(&error) }),
            };
            report("ping", fields);
        }
        BehaviourEvent::Identify(identify::Event::Received { peer_id, info, .. }) => {
            report("identified", identified(peer_id, &info));
        }
        BehaviourEvent::Identify(identify::Event::Sent { peer_id, .. }) => {
            report("identify-sent", json!({ "peer": peer_id.to_string() }));
        }
        BehaviourEvent::Identify(identify::Event::Pushed { peer_id, .. }) => {
            report("identify-pushed", json!({ "peer": peer_id.to_string() }));
        }
        BehaviourEvent::Identify(identify::Event::Error { peer_id, error, .. }) => {
            report("identify-failed", json!({ "peer": peer_id.to_string(), "error": chain(&error) }));
        }
        BehaviourEvent::Relay(event) => report("relay", json!({ "what": format!("{event:?}") })),
        BehaviourEvent::RelayClient(event) => on_circuit(event),
        BehaviourEvent::AutonatV2Server(event) => autonat::on_v2_server(event),
        BehaviourEvent::AutonatV2Client(event) => autonat::on_v2_client(event),
        BehaviourEvent::AutonatV1(_) | BehaviourEvent::Streams(()) => {}
    }
}

fn on_circuit(event: relay::client::Event) {
    use relay::client::Event::{InboundCircuitEstablished, OutboundCircuitEstablished, ReservationReqAccepted};
    let (name, peer, renewal, limit) = match event {
        ReservationReqAccepted { relay_peer_id, renewal, limit } => ("reserved", relay_peer_id, renewal, limit),
        OutboundCircuitEstablished { relay_peer_id, limit } => ("circuit-out", relay_peer_id, false, limit),
        InboundCircuitEstablished { src_peer_id, limit } => ("circuit-in", src_peer_id, false, limit),
    };
    let limit = limit.map(|limit| {
        json!({ "seconds": limit.duration().map(|seconds| seconds.as_secs()), "bytes": limit.data_in_bytes() })
    });
    report(name, json!({ "peer": peer.to_string(), "renewal": renewal, "limit": limit }));
}

/// What a peer told of itself. The library keeps a signed record only if it verifies, and only in its own old form
/// (domain `libp2p-routing-state`); one in the specified form (`libp2p-peer-record`) it passes over.
fn identified(peer: PeerId, info: &identify::Info) -> Value {
    let strings = |addresses: &[Multiaddr]| addresses.iter().map(Multiaddr::to_string).collect::<Vec<_>>();
    let record = info.signed_peer_record.clone().and_then(|envelope| PeerRecord::from_signed_envelope(envelope).ok());
    json!({
        "peer": peer.to_string(),
        "agent": info.agent_version,
        "protocol_version": info.protocol_version,
        "protocols": info.protocols.iter().map(StreamProtocol::to_string).collect::<Vec<_>>(),
        "addresses": strings(&info.listen_addrs),
        "observed": info.observed_addr.to_string(),
        "key": identity::PublicKey::to_peer_id(&info.public_key).to_string(),
        "record": record.map(|record| json!({
            "peer": record.peer_id().to_string(), "seq": record.seq(), "addresses": strings(record.addresses()),
        })),
    })
}
