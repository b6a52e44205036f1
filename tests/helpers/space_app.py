"""The page in a process of its own, as `hf-epimer demo --web` starts it, at home or as if on a Hugging Face Space."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType

SECRET = "client-secret"


class SpaceApp:
    """Running while its `with` block lasts; whatever it prints is in `log`, its temporary folders are in `temp`."""

    def __init__(self, home: Path, folder: Path, hub_url: str, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._address = f"http://127.0.0.1:{port}/"
        self.temp = folder / "tmp"
        self.temp.mkdir(parents=True)
        self._log = folder / "log"
        self._environment = {
            **os.environ,
            "HF_HOME": str(home),
            "HF_ENDPOINT": hub_url,
            "TMPDIR": str(self.temp),
            "GRADIO_SERVER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            **environment,
        }

    def __enter__(self) -> SpaceApp:
        """Start it; `url` waits until it is there, so that several can be started side by side."""
        command = [sys.executable, "-m", "hf_epimer", "demo", "--web"]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self._environment, cwd=self.temp
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        finally:
            self.process.kill()

    @property
    def url(self) -> str:
        """Where it is, once it answers."""
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(self._address, timeout=5).close()
                return self._address
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"the page did not open: {self.log}")

    @property
    def log(self) -> str:
        """Everything it has printed."""
        return self._log.read_text(errors="replace")

    def leftovers(self) -> list[str]:
        """Folders of visitors' work, by their names."""
        return sorted(path.name for path in self.temp.glob("hf-epimer-web-*/visitor-*/*"))

    def files(self) -> list[Path]:
        """Every file it has written to its temporary folders."""
        return [path for path in self.temp.rglob("*") if path.is_file()]


AS_ON_A_SPACE = {
    "SYSTEM": "spaces",
    "SPACE_ID": "org/space",
    "OAUTH_CLIENT_ID": "client",
    "OAUTH_CLIENT_SECRET": SECRET,
    "OAUTH_SCOPES": "openid profile contribute-repos",
}
"""What the Hub sets in a Space with `hf_oauth: true`; OPENID_PROVIDER_URL goes to the stand-in."""


def signed_in(name: str, token: str) -> dict[str, str]:
    """The cookie that gradio sets after a sign-in with the Hub, made with the Space's own secret."""
    from itsdangerous import TimestampSigner

    user = {"name": name, "preferred_username": name, "profile": f"https://hub/{name}", "picture": ""}
    session = {"oauth_info": {"access_token": token, "scope": "", "expires_at": time.time() + 3600, "userinfo": user}}
    key = hashlib.sha256(f"{SECRET}-v4".encode()).hexdigest()
    value = TimestampSigner(key).sign(base64.b64encode(json.dumps(session).encode()))
    return {"Cookie": f"session={value.decode()}"}
