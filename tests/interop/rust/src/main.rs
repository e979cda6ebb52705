//! `kas-interop-peer`: a rust-libp2p node that does what a test tells it.
//!
//! ```text
//! kas-interop-peer listen [ADDR ...] [OPTIONS]     listen (default /ip4/127.0.0.1/tcp/0)
//! kas-interop-peer dial ADDR [OPTIONS]             connect to ADDR; listens only where --listen says so
//! kas-interop-peer bench ADDR [OPTIONS]            measure against another kas-interop-peer (or ours), then exit
//! ```
//!
//! One JSON object per line on stdout, each with a field `event`. Orders come as JSON objects, one per line on stdin:
//! `{"id": 1, "do": "ping", "peer": "12D3…"}`; each is answered by `{"event": "done", "id": 1, …}` or
//! `{"event": "failed", "id": 1, "error": "…"}`. It exits when stdin closes. The orders are listed at [`node::run`].

mod actions;
mod autonat;
mod kaspa;
mod node;
mod protocols;
mod report;

use std::process::ExitCode;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use libp2p::Multiaddr;
use libp2p::identity::Keypair;
use serde_json::json;

use report::{QUIET, report, text};

/// What the command line says.
pub struct Options {
    pub key: Keypair,
    pub listen: Vec<Multiaddr>,
    pub dial: Option<Multiaddr>,
    pub bench: bool,
    /// multistream-select for security and muxer: 0-RTT (`lazy`, the library's builder default) or not (`v1`).
    pub lazy_connection: bool,
    /// The same for streams; the library's default is `v1`.
    pub lazy_streams: bool,
    pub idle_timeout: Duration,
    pub ping_interval: Duration,
    pub max_streams: usize,
    pub agent: Option<String>,
    pub protocol_version: String,
    pub signed_record: bool,
    pub push: bool,
    /// What it gives away as a relay; `None`: it is none.
    pub relay: Option<node::RelayLimits>,
    pub autonat: autonat::Settings,
    pub threads: usize,
    pub kaspa: kaspa::Settings,
    pub megabytes: u64,
    pub rounds: u32,
}

const USAGE: &str = "usage: kas-interop-peer listen [ADDR ...] | dial ADDR | bench ADDR
  --key HEX | --seed N         ed25519 secret key: 32 bytes in hexadecimal, or made from a number; else random
  --listen ADDR                listen address (repeatable)
  --connection v1|lazy         multistream-select of the connection (lazy)
  --streams v1|lazy            multistream-select of streams (v1)
  --idle SECONDS               close a connection without streams after this time (60)
  --ping SECONDS               interval of the automatic pings (15)
  --max-streams N              yamux: streams per connection (512)
  --agent TEXT                 agent version told by identify (the library's)
  --protocol-version TEXT      protocol version told by identify (/kaspad/libp2p/1.1.0)
  --signed-record              tell a signed peer record in identify
  --push                       push changes of listen addresses with identify
  --relay                      be a relay with the library's limits; of these, the following change one
  --relay-open                 be a relay without limits
  --relay-bytes N, --relay-seconds SECONDS, --relay-reservation SECONDS
  --autonat-v1                 AutoNAT v1, client and server, with the limits of kaspad's overlay
  --autonat-interval SECONDS   between two v1 tests of itself, by the same server or not (the library's)
  --autonat-v2-server, --autonat-v2-client
  --threads N                  worker threads; 1 is the single-threaded runtime (2)
  --network NAME               Kaspa network (kaspa-simnet)
  --kaspa-version N            Kaspa protocol version (11)
  --kaspa-oldest N             oldest Kaspa protocol version accepted (9)
  --no-gzip                    do not compress Kaspa messages
  --quiet                      print answers only, not what happens meanwhile (bench always does)
  --megabytes N, --rounds N    bench: bytes per transfer (64), rounds (5)";

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(problem) => {
            eprintln!("{problem}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let mut runtime = if options.threads == 1 {
        tokio::runtime::Builder::new_current_thread()
    } else {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(options.threads);
        builder
    };
    let runtime = runtime.enable_all().build().expect("a runtime can be built");
    let result = runtime.block_on(node::run(options));
    // The task that reads stdin sits in a blocking read, which nothing can interrupt.
    runtime.shutdown_timeout(Duration::ZERO);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            report("fatal", json!({ "error": text(problem) }));
            ExitCode::FAILURE
        }
    }
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut arguments = arguments.peekable();
    let command = arguments.next().ok_or("a command is missing")?;
    let mut positional = Vec::new();
    let mut options = Options {
        key: Keypair::generate_ed25519(),
        listen: Vec::new(),
        dial: None,
        bench: command == "bench",
        lazy_connection: true,
        lazy_streams: false,
        idle_timeout: Duration::from_secs(60),
        ping_interval: Duration::from_secs(15),
        max_streams: 512,
        agent: None,
        protocol_version: "/kaspad/libp2p/1.1.0".to_owned(),
        signed_record: false,
        push: false,
        relay: None,
        autonat: autonat::Settings::default(),
        threads: 2,
        kaspa: kaspa::Settings::default(),
        megabytes: 64,
        rounds: 5,
    };
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--key" => options.key = key_from_hex(&value()?)?,
            "--seed" => {
                let mut secret = [0; 32];
                secret[..8].copy_from_slice(&number::<u64>(&value()?)?.to_be_bytes());
                options.key = Keypair::ed25519_from_bytes(secret).map_err(text)?;
            }
            "--listen" => options.listen.push(address(&value()?)?),
            "--connection" => options.lazy_connection = lazy(&value()?)?,
            "--streams" => options.lazy_streams = lazy(&value()?)?,
            "--idle" => options.idle_timeout = Duration::from_secs_f64(number(&value()?)?),
            "--ping" => options.ping_interval = Duration::from_secs_f64(number(&value()?)?),
            "--max-streams" => options.max_streams = number(&value()?)?,
            "--agent" => options.agent = Some(value()?),
            "--protocol-version" => options.protocol_version = value()?,
            "--signed-record" => options.signed_record = true,
            "--push" => options.push = true,
            "--relay" => options.relay = Some(node::RelayLimits::default()),
            "--relay-open" => options.relay = Some(node::RelayLimits { open: true, ..Default::default() }),
            "--relay-bytes" => options.relay.get_or_insert_default().bytes = Some(number(&value()?)?),
            "--relay-seconds" => options.relay.get_or_insert_default().seconds = Some(number(&value()?)?),
            "--relay-reservation" => options.relay.get_or_insert_default().reservation = Some(number(&value()?)?),
            "--autonat-v1" => options.autonat.v1 = true,
            "--autonat-interval" => options.autonat.interval = Some(Duration::from_secs_f64(number(&value()?)?)),
            "--autonat-v2-server" => options.autonat.v2_server = true,
            "--autonat-v2-client" => options.autonat.v2_client = true,
            "--threads" => options.threads = number(&value()?)?,
            "--network" => options.kaspa.network = value()?,
            "--kaspa-version" => options.kaspa.version = number(&value()?)?,
            "--kaspa-oldest" => options.kaspa.oldest = number(&value()?)?,
            "--quiet" => QUIET.store(true, Relaxed),
            "--no-gzip" => options.kaspa.gzip = false,
            "--megabytes" => options.megabytes = number(&value()?)?,
            "--rounds" => options.rounds = number(&value()?)?,
            flag if flag.starts_with("--") => return Err(format!("unknown option {flag}")),
            plain => positional.push(address(plain)?),
        }
    }
    QUIET.fetch_or(command == "bench", Relaxed);
    match command.as_str() {
        "listen" => {
            options.listen.extend(positional);
            if options.listen.is_empty() {
                options.listen.push(address("/ip4/127.0.0.1/tcp/0")?);
            }
        }
        "dial" | "bench" => match <[Multiaddr; 1]>::try_from(positional) {
            Ok([target]) => options.dial = Some(target),
            Err(_) => return Err(format!("{command} needs one address")),
        },
        other => return Err(format!("unknown command {other}")),
    }
    Ok(options)
}

fn number<T: std::str::FromStr<Err: std::fmt::Display>>(value: &str) -> Result<T, String> {
    value.parse().map_err(|error| format!("{value}: {error}"))
}

fn address(value: &str) -> Result<Multiaddr, String> {
    value.parse().map_err(|error| format!("{value}: {error}"))
}

fn lazy(value: &str) -> Result<bool, String> {
    match value {
        "v1" => Ok(false),
        "lazy" => Ok(true),
        _ => Err(format!("{value}: v1 or lazy")),
    }
}

fn key_from_hex(value: &str) -> Result<Keypair, String> {
    if value.len() != 64 || !value.is_ascii() {
        return Err("--key needs 64 hexadecimal digits".to_owned());
    }
    let mut secret = [0; 32];
    for (byte, digits) in secret.iter_mut().zip(value.as_bytes().chunks(2)) {
        let digits = std::str::from_utf8(digits).expect("ascii");
        *byte = u8::from_str_radix(digits, 16).map_err(text)?;
    }
    Keypair::ed25519_from_bytes(secret).map_err(text)
}
