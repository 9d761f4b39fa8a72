"""Start, watch and stop the embedded stack. Processes are supervised by supervisord."""

import hashlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy

import httpx
from supervisor.xmlrpc import SupervisorTransport

from personalization.errors import LocalStackError
from personalization.local.config import HOST, StackConfig, write_private
from personalization.local.services import (
    Service,
    airflow_services,
    app_services,
    store_services,
    write_server_files,
)

EMBEDDING_POOL = "embedding"

_UP_TIMEOUT_S = 300
_LOG_LINES = 15
_CONF = "supervisord.conf"
_SIGNS_OF_CONFIGURATION = (" ;", " #", "%", "${")  # comments and expansions, which cannot be quoted


@dataclass(frozen=True)
class ServiceState:
    """What the supervisor knows of a process."""

    name: str
    state: str
    """supervisord's: RUNNING, STOPPED, EXITED, FATAL …"""
    description: str
    port: int | None
    log: Path

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self.state in ("RUNNING", "STARTING")

    @property
    def crashed(self) -> bool:
        """Whether the process ended by itself."""
        return self.state in ("EXITED", "FATAL", "BACKOFF")


class Stack:
    """The embedded stack of one project folder."""

    def __init__(self, config: StackConfig, *, only_stores: bool = False) -> None:
        self.config = config
        self._stores = store_services(config)
        self._others = [*airflow_services(config), *app_services(config)]
        self._only_stores = only_stores
        # A Unix socket's path may hold about 100 characters, a project's folder any number.
        digest = hashlib.blake2b(str(config.root).encode(), digest_size=6).hexdigest()
        self._socket = Path(tempfile.gettempdir()) / f"personalization-{os.getuid()}-{digest}.sock"

    @property
    def services(self) -> list[Service]:
        """Every process that is wanted, in starting order."""
        return self._stores if self._only_stores else [*self._stores, *self._others]

    def start(self, say: Callable[[str], None]) -> None:
        """Bring up what is not running and wait until everything answers.

        Raises:
            LocalStackError: a port is taken, a piece is missing, or a process died; says what to do.
        """
        running = {state.name for state in self.states() if state.running}
        self._check_ports([service for service in self.services if service.name not in running])
        write_server_files(self.config)
        self._start_supervisor(anything_running=bool(running))
        self._launch(self._stores, running, say)
        if not self._only_stores:
            if "airflow" not in running:
                say("airflow: preparing its database")
                self._migrate_airflow()
            self._launch(self._others, running, say)
            self._ensure_pool()
        self.config.write_env_file()

    def stop(self) -> bool:
        """Stop every process and the supervisor; return whether anything was running."""
        supervisor = self._supervisor()
        if supervisor is None:
            return False
        self._stop_supervisor(supervisor)
        self.config.env_file.unlink(missing_ok=True)
        return True

    def _stop_supervisor(self, supervisor: Any) -> None:
        pid = supervisor.getPID()
        supervisor.shutdown()
        _wait_for(lambda: not _alive(pid), 90, "the supervisor did not stop")

    def reset(self) -> None:
        """Stop, and delete all data of the stack."""
        self.stop()
        if not (self.config.root / _CONF).exists():
            raise LocalStackError(f"{self.config.root} does not look like the stack's folder; nothing was deleted")
        shutil.rmtree(self.config.root)

    def states(self) -> list[ServiceState]:
        """The state of every process; STOPPED while the supervisor is down."""
        supervisor = self._supervisor()
        known = {one["name"]: one for one in supervisor.getAllProcessInfo()} if supervisor else {}
        return [
            ServiceState(
                service.name,
                known.get(service.name, {}).get("statename", "STOPPED"),
                known.get(service.name, {}).get("description", ""),
                service.port,
                self.log_file(service.name),
            )
            for service in self.services
        ]

    def log_file(self, name: str) -> Path:
        """The log of one service."""
        return self.config.logs / f"{name}.log"

    def check_alive(self, names: Collection[str] | None = None) -> None:
        """Raise a `LocalStackError` naming the log of the first process (of those named) that ended by itself."""
        for state in self.states():
            if state.crashed and (names is None or state.name in names):
                tail = "\n".join(state.log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
                raise LocalStackError(f"{state.name} died ({state.description}). Its log {state.log} ends:\n{tail}")

    def _launch(self, services: Sequence[Service], running: set[str], say: Callable[[str], None]) -> None:
        started = time.monotonic()
        names = {service.name for service in services}
        for service in services:
            if service.name not in running:
                self._call("startProcess", service.name, False)
        for service in services:
            if service.answers is not None:
                self._wait_until_it_answers(service.name, service.answers, names)
                where = f"on {HOST}:{service.port}"
                how = "already running" if service.name in running else f"up after {time.monotonic() - started:.0f} s"
                say(f"{service.name}: {how} {where}")

    def _wait_until_it_answers(self, name: str, answers: Callable[[], object], started: Collection[str]) -> None:
        deadline = time.monotonic() + _UP_TIMEOUT_S
        last: Exception | None = None
        while time.monotonic() < deadline:
            self.check_alive(started)
            try:
                answers()
            except Exception as error:  # noqa: BLE001 - whatever the driver raises: not up yet, kept as the reason
                last = error
                time.sleep(0.25)
            else:
                return
        log = self.log_file(name)
        raise LocalStackError(f"{name} does not answer after {_UP_TIMEOUT_S} s ({last}); see {log}")

    def _check_ports(self, services: Sequence[Service]) -> None:
        for service in services:
            if service.port is None:
                continue
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((HOST, service.port))
                except OSError:
                    raise LocalStackError(
                        f"port {service.port} for {service.name} is taken by another process; stop that one, "
                        f"or choose another port: make demo {service.port_setting}={service.port + 10}"
                    ) from None

    def _start_supervisor(self, *, anything_running: bool) -> None:
        conf = self.config.root / _CONF
        wanted = self._supervisor_conf()
        supervisor = self._supervisor()
        if supervisor is not None:
            if conf.read_text(encoding="utf-8") == wanted:
                return
            if anything_running:
                raise LocalStackError("the stack is up with other ports or settings; run `make stop` first")
            self._stop_supervisor(supervisor)
        write_private(conf, wanted)
        started = subprocess.run(
            [sys.executable, "-m", "supervisor.supervisord", "-c", str(conf)],
            env=self.config.process_env,
            cwd=self.config.project,
            check=False,
            capture_output=True,
            text=True,
        )
        if started.returncode:
            raise LocalStackError(f"supervisord did not start: {started.stderr.strip() or started.stdout.strip()}")
        _wait_for(lambda: self._supervisor() is not None, 30, f"supervisord did not start; see {self.config.logs}")

    def _supervisor_conf(self) -> str:
        for sign in _SIGNS_OF_CONFIGURATION:
            if sign in f"{self.config.root}{self.config.project}":
                raise LocalStackError(
                    f"{self.config.project}: the stack cannot work in a folder with {sign!r} in its name; move it"
                )

        def program(service: Service) -> str:
            command = shlex.join(service.command).replace("%", "%%")
            return (
                f"[program:{service.name}]\ncommand={command}\n"
                f"directory={service.folder or self.config.project}\n"
                f"stdout_logfile={self.log_file(service.name)}\nredirect_stderr=true\n"
                f"stdout_logfile_maxbytes=10MB\nstdout_logfile_backups=2\n"
                # A crash shall be seen, not papered over: `make status` names it, `make demo` starts it again.
                f"autostart=false\nautorestart=false\nstartsecs=0\nstopwaitsecs=20\n"
                f"stopsignal=TERM\nstopasgroup=true\nkillasgroup=true\n"
            )

        head = (
            f"; environment {self.config.env_digest}\n"
            f"[supervisord]\nlogfile={self.config.logs / 'supervisord.log'}\n"
            f"pidfile={self.config.root / 'supervisord.pid'}\nchildlogdir={self.config.logs}\n"
            f"[unix_http_server]\nfile={self._socket}\nchmod=0700\n"
            "[rpcinterface:supervisor]\n"
            "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface\n"
        )
        return head + "".join(program(service) for service in [*self._stores, *self._others])

    def _supervisor(self) -> Any | None:
        """supervisord's RPC interface, or None while it is down."""
        transport = SupervisorTransport(None, None, f"unix://{self._socket}")
        supervisor = ServerProxy("http://127.0.0.1", transport=transport).supervisor
        try:
            supervisor.getState()
        except OSError:
            return None
        return supervisor

    def _call(self, method: str, *arguments: object) -> None:
        supervisor = self._supervisor()
        if supervisor is None:
            raise LocalStackError(f"supervisord is gone; see {self.config.logs / 'supervisord.log'}")
        try:
            getattr(supervisor, method)(*arguments)
        except Fault as fault:
            raise LocalStackError(f"{arguments[0]} cannot be started: {fault.faultString}") from fault

    def _migrate_airflow(self) -> None:
        log = self.log_file("airflow-migrate")
        with log.open("ab") as output:
            done = subprocess.run(
                [sys.executable, "-m", "airflow", "db", "migrate"],
                env=self.config.process_env,
                cwd=self.config.project,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode:
            raise LocalStackError(f"airflow db migrate failed; see {log}")

    def _ensure_pool(self) -> None:
        """One embedding task at a time: each uses all cores."""
        url = f"http://{HOST}:{self.config.airflow_port}"
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            token = client.get("/auth/token").raise_for_status().json()["access_token"]
            client.headers["Authorization"] = f"Bearer {token}"
            if client.get(f"/api/v2/pools/{EMBEDDING_POOL}").status_code == httpx.codes.NOT_FOUND:
                pool = {
                    "name": EMBEDDING_POOL,
                    "slots": 1,
                    "description": "Tasks that load the embedding model",
                }
                client.post("/api/v2/pools", json=pool).raise_for_status()


def _wait_for(condition: Callable[[], bool], seconds: float, problem: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise LocalStackError(problem)
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
