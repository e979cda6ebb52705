//! Lines of JSON on stdout, and what is measured about this process.

use std::fmt::Display;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use serde_json::{Value, json};

/// Whether only answers are printed, not what happens meanwhile: for measurements.
pub static QUIET: AtomicBool = AtomicBool::new(false);
/// What is printed all the same.
const ANSWERS: [&str; 6] = ["started", "listening", "done", "failed", "bench", "fatal"];

/// Print `{"event": name, …fields}` as one line. Leaves the process when nobody reads it any more.
pub fn report(name: &str, fields: Value) {
    if QUIET.load(Relaxed) && !ANSWERS.contains(&name) {
        return;
    }
    let mut line = json!({ "event": name });
    if let (Value::Object(line), Value::Object(fields)) = (&mut line, fields) {
        line.extend(fields);
    }
    let mut out = std::io::stdout().lock();
    if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

/// An error as text with all its causes.
pub fn text(error: impl Display) -> String {
    error.to_string()
}

/// The same for errors that know their causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut parts = vec![error.to_string()];
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if parts.last() != Some(&cause_text) {
            parts.push(cause_text);
        }
        source = cause.source();
    }
    parts.join(": ")
}

/// CPU seconds used by all threads of this process so far.
pub fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid, writable timespec for the length of the call.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    assert_eq!(failed, 0, "the process clock exists on every Linux");
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
