//! `kas-interop-punch` of the rust-libp2p that the other programs here are made of.

#[path = "../punch.rs"]
mod punch;

fn main() -> std::process::ExitCode {
    punch::main()
}
