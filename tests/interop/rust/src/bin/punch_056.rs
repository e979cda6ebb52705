//! `kas-interop-punch` of rust-libp2p 0.56, which tells the port that others saw, where 0.57 tells that it listens on.

extern crate libp2p_056 as libp2p;
extern crate libp2p_stream_056 as libp2p_stream;

#[path = "../punch.rs"]
mod punch;

fn main() -> std::process::ExitCode {
    punch::main()
}
