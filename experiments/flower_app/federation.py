"""A Flower federation on this machine: a SuperLink, a SuperNode for each client, and one run of the app on them.

    python experiments/flower_app/federation.py --nodes 4 [--tls] [--settings "strategy=gpfl dataset=digits rounds=3"]

The run's log goes to the screen, its result to ``--result`` if one is given; then everything is stopped, also on
Ctrl-C or after an error. Ports that are free are taken, and nothing is written into the user's Flower settings.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).resolve().parent
PROGRAMS = Path(sys.executable).parent
HOST = "127.0.0.1"
START_SECONDS = 180.0
STOP_SECONDS = 10.0


class FederationError(Exception):
    """What cannot go on, in one sentence."""


class Federation:
    """A SuperLink and SuperNodes on loopback; a context manager that stops them all.

    Parameters
    ----------
    nodes : int
        SuperNodes, one for each client; node k gets ``partition-id=k``.
    tls : bool
        Encrypt, with a certificate made for this federation.
    environment : mapping, optional
        Variables for all processes, beside those of this one.
    """

    def __init__(self, nodes: int, *, tls: bool = False, environment: Mapping[str, str] | None = None) -> None:
        self.nodes = nodes
        self.tls = tls
        self._temporary = tempfile.TemporaryDirectory(prefix="federation-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.address = f"{HOST}:{_free_port()}"
        self._environment = {
            **os.environ,
            **(environment or {}),
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # seconds; one message follows the other
            "PATH": f"{PROGRAMS}{os.pathsep}{os.environ.get('PATH', '')}",
        }

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        _, _, port = self.address.partition(":")
        if self.tls:
            make_certificates(self.folder)
            files = {"certfile": "server.pem", "keyfile": "server.key", "ca-certfile": "ca.pem"}
            security = [part for name, file in files.items() for part in (f"--ssl-{name}", str(self.folder / file))]
            trust = ["--root-certificates", str(self.folder / "ca.pem")]
            connection = f'root-certificates = "{self.folder / "ca.pem"}"'
        else:
            security, trust, connection = ["--insecure"], ["--insecure"], "insecure = true"
        home = self.folder / "flwr"
        home.mkdir()
        text = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{self.address}"\n{connection}\n'
        (home / "config.toml").write_text(text, encoding="utf-8")
        command = ["flower-superlink", *security, "--host", HOST, "--port", port]
        self._launch("superlink", [*command, "--isolation", "process"])
        deadline = time.monotonic() + START_SECONDS
        while not _listens(int(port)):
            self.check()
            if time.monotonic() > deadline:
                raise FederationError(f"the SuperLink does not listen on {self.address} after {START_SECONDS:g} s.")
            time.sleep(0.1)
        # starts the server's side of runs; the SuperLink would start it too, but detached, out of reach of stop()
        self._launch("superexec", ["flower-superexec", *trust, "--runtime-api-address", self.address])
        for number in range(self.nodes):
            self.start_node(number)

    def start_node(self, number: int) -> None:
        """Start the SuperNode of a client."""
        security = ["--root-certificates", str(self.folder / "ca.pem")] if self.tls else ["--insecure"]
        config = f"partition-id={number} num-partitions={self.nodes}"
        command = ["flower-supernode", *security, "--superlink", self.address, "--port", str(_free_port())]
        self._launch(f"supernode-{number}", [*command, "--node-config", config])

    def stop_node(self, number: int) -> None:
        """Stop the SuperNode of a client."""
        _stop([self._processes.pop(f"supernode-{number}")])

    def run(self, settings: str, result: Path, *, timeout: float, app: Path = HERE) -> dict[str, Any]:
        """Run the app and wait for its result.

        Parameters
        ----------
        settings : str
            What the app's ``settings`` are.
        result : Path
            File the server writes; must not exist.
        timeout : float
            Seconds.
        app : Path
            The app's folder.

        Returns
        -------
        dict
            What is in `result`.

        Raises
        ------
        FederationError
            If a process ends, the run fails or `timeout` passes.
        """
        if result.exists():
            raise FederationError(f"{result} exists already; choose another file with --result.")
        config = self.folder / "run.toml"
        config.write_text(f"settings = {json.dumps(settings)}\nresult = {json.dumps(str(result.resolve()))}\n")
        command = [str(PROGRAMS / "flwr"), "run", str(app), "here", "--run-config", str(config), "--stream"]
        run: subprocess.Popen[bytes] | None = None
        deadline = time.monotonic() + timeout
        try:
            with _signals_deferred():
                run = subprocess.Popen(command, env=self._environment, start_new_session=True)
            while run.poll() is None:
                self.check()
                if time.monotonic() > deadline:
                    raise FederationError(f"the run has not ended after {timeout:g} s.")
                time.sleep(0.2)
        finally:
            if run is not None:
                _stop([run])
        if not result.exists():
            raise FederationError("the run failed; its log is above.")
        outcome: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return outcome

    def check(self) -> None:
        """Raise if a process has ended by itself."""
        for name, process in self._processes.items():
            if (code := process.poll()) is not None:
                log = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
                raise FederationError(f"{name} ended with {code}:\n{log[-3000:]}")

    def stop(self) -> None:
        """Stop everything and delete the folder."""
        names = sorted(self._processes, reverse=True)  # nodes before the link they report to
        with _signals_deferred():
            _stop([self._processes.pop(name) for name in names])
            self._temporary.cleanup()

    def _launch(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log, _signals_deferred():
            self._processes[name] = subprocess.Popen(
                [str(PROGRAMS / command[0]), *command[1:]],
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, with the processes it starts
            )


def make_certificates(folder: Path) -> None:
    """Write ``ca.pem``, and ``server.pem`` and ``server.key`` for this machine, valid for a day."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.now(UTC)

    def certificate(
        subject: str, key: ec.EllipticCurvePrivateKey, issuer: str, signer: ec.EllipticCurvePrivateKey, *, ca: bool
    ) -> x509.Certificate:
        def name(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

        uses = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
             "decipher_only"), False,
        )  # fmt: skip
        usage = x509.KeyUsage(digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, **uses)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(HOST))]
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        )
        if not ca:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(signer, hashes.SHA256())

    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    ca = certificate("federation", authority, "federation", authority, ca=True)
    (folder / "ca.pem").write_bytes(ca.public_bytes(pem))
    server_certificate = certificate("localhost", server, "federation", authority, ca=False)
    (folder / "server.pem").write_bytes(server_certificate.public_bytes(pem))
    key = server.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.key").touch(mode=0o600)
    (folder / "server.key").write_bytes(key)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait, so that no process is started and not noted, or left while others are stopped."""
    if threading.current_thread() is not threading.main_thread():  # signals interrupt the main thread only
        yield
        return
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for waiting in dict.fromkeys(received):
            signal.raise_signal(waiting)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes and what they have started: first asked, then killed."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        try:
            os.killpg(process.pid, signal.SIGKILL)  # its group lives on while a child does
        except ProcessLookupError:
            continue


def main() -> int:
    """Run; 0 if it went well, 1 if not."""
    parser = argparse.ArgumentParser(description="A Flower federation on this machine, and one run of the app on it.")
    parser.add_argument("--nodes", type=int, default=4, help="SuperNodes, one for each client (default 4)")
    parser.add_argument("--tls", action="store_true", help="encrypt, with certificates made for this run")
    parser.add_argument("--settings", default="strategy=gpfl dataset=digits rounds=3", help="as after 'fedpers'")
    parser.add_argument("--result", type=Path, help="file for the result (JSON)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for the run (default 1800)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is stopped
    try:
        with Federation(options.nodes, tls=options.tls) as federation:
            result = options.result or federation.folder / "result.json"
            settings = f"{options.settings} partition.num_clients={options.nodes}"
            outcome = federation.run(settings, result, timeout=options.timeout)
    except FederationError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"after round {outcome['round']}:")
    for client, metrics in outcome["clients"].items():
        print(f"  client {client}: " + ", ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
