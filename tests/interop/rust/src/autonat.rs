//! AutoNAT of both versions, both ways; what is heard of it is printed.

use std::time::Duration;

use libp2p::autonat::v1::{InboundProbeEvent, NatStatus, OutboundProbeEvent};
use libp2p::autonat::{v1, v2};
use libp2p::{Multiaddr, PeerId};
use serde_json::{Value, json};

use crate::report::{report, text};

/// What there is of it.
#[derive(Default)]
pub struct Settings {
    /// v1, client and server.
    pub v1: bool,
    /// Between two v1 tests of this peer; `None`: as the library has it.
    pub interval: Option<Duration>,
    pub v2_server: bool,
    pub v2_client: bool,
}

impl Settings {
    /// As the overlay inside kaspad has it: a peer is dialed back once a minute.
    pub fn v1_config(&self) -> v1::Config {
        let mut config = v1::Config {
            throttle_clients_peer_max: 1,
            throttle_clients_period: Duration::from_secs(60),
            ..Default::default()
        };
        if let Some(interval) = self.interval {
            config.boot_delay = interval;
            config.retry_interval = interval;
            config.refresh_interval = interval;
            config.throttle_server_period = Duration::ZERO;
        }
        config
    }
}

/// `autonat-asked`: a test of this peer by another; `autonat-served`: the reverse; `autonat-status`: what follows.
pub fn on_v1(event: v1::Event, confidence: usize) {
    match event {
        v1::Event::OutboundProbe(OutboundProbeEvent::Request { .. })
        | v1::Event::InboundProbe(InboundProbeEvent::Request { .. }) => {}
        v1::Event::OutboundProbe(OutboundProbeEvent::Response { peer, address, .. }) => {
            told("asked", 1, Some(peer), Some(&address), json!({ "confidence": confidence }));
        }
        v1::Event::OutboundProbe(OutboundProbeEvent::Error { peer, error, .. }) => {
            told("asked", 1, peer, None, json!({ "confidence": confidence, "error": format!("{error:?}") }));
        }
        v1::Event::InboundProbe(InboundProbeEvent::Response { peer, address, .. }) => {
            told("served", 1, Some(peer), Some(&address), json!({}));
        }
        v1::Event::InboundProbe(InboundProbeEvent::Error { peer, error, .. }) => {
            told("served", 1, Some(peer), None, json!({ "error": format!("{error:?}") }));
        }
        v1::Event::StatusChanged { new, .. } => {
            let status = match new {
                NatStatus::Public(_) => "public",
                NatStatus::Private => "private",
                NatStatus::Unknown => "unknown",
            };
            report("autonat-status", json!({ "status": status }));
        }
    }
}

pub fn on_v2_client(event: v2::client::Event) {
    let fields = json!({ "bytes": event.bytes_sent, "error": event.result.err().map(text) });
    told("asked", 2, Some(event.server), Some(&event.tested_addr), fields);
}

/// Without an error the answer was sent, whatever it was.
pub fn on_v2_server(event: v2::server::Event) {
    let fields = json!({ "bytes": event.data_amount, "error": event.result.err().map(text) });
    told("served", 2, Some(event.client), Some(&event.tested_addr), fields);
}

fn told(what: &str, version: u8, peer: Option<PeerId>, address: Option<&Multiaddr>, mut fields: Value) {
    fields["version"] = version.into();
    fields["peer"] = json!(peer.map(|peer| peer.to_string()));
    fields["address"] = json!(address.map(Multiaddr::to_string));
    report(&format!("autonat-{what}"), fields);
}
