"""Any program, in any language: a web server behind a firewall, which nobody outside can reach, and one in the open."""

import sys
import urllib.request

import pytest

from natlab import LabError

SERVER = [sys.executable, "-u", "-m", "http.server", "8000"]


@pytest.mark.natlab("alice=fw", "bob=pr,delay=10ms", "relay=public")
def test_a_server_behind_a_firewall(lab, tmp_path):
    (tmp_path / "index.html").write_text("hello from behind")
    server = lab["alice"].spawn(SERVER, cwd=tmp_path)
    server.expect(r"port (\d+)")

    def get(address, timeout=10):
        return urllib.request.urlopen(f"http://{address}:8000/", timeout=timeout).read()

    assert lab["alice"].python(get, "127.0.0.1") == b"hello from behind"
    with pytest.raises(OSError, match="timed out"):
        lab["bob"].python(get, lab["alice"].address, 0.5)

    public = lab["relay"].spawn(SERVER, cwd=tmp_path)
    public.expect("port")
    assert lab["bob"].python(get, lab["relay"].address) == b"hello from behind"
    assert lab["bob"].public_address in public.expect(r"(\S+) - - .*GET / ")[1]

    lab["relay"].kill()
    with pytest.raises(LabError, match="ended with status -9"):
        public.expect("never")
