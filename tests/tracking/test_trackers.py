"""Trackers: what they write, that failures are contained, and that wandb offline stays offline."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from fedpers.errors import ConfigError, FedpersError
from fedpers.tracking import (
    ConsoleTracker,
    JsonlTracker,
    Resumed,
    TensorBoardConfig,
    TrackerConfig,
    Trackers,
    WandbConfig,
    WandbTracker,
    make_trackers,
)
from fedpers.tracking import console as console_module
from fedpers.tracking.console import WithoutProgress
from fedpers.tracking.weights_and_biases import _logged_in
from tests import tracked

METRICS = {"validation/accuracy": 0.5, "test/accuracy_worst_decile": 0.25, "bytes_up": 1000}


class Recorder:
    """Keeps its calls; raises in the method named `broken`."""

    def __init__(self, broken=""):
        self.calls = []
        self.broken = broken

    def _take(self, name, *values):
        self.calls.append((name, *values))
        if name == self.broken:
            raise RuntimeError(f"no\n{name}")

    def log(self, round, metrics):
        self._take("log", round, dict(metrics))

    def summary(self, metrics):
        self._take("summary", dict(metrics))

    def clients(self, values):
        self._take("clients", dict(values))

    def close(self):
        self._take("close")


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    """Make sure that tests never see or use a login of whoever runs them."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_jsonl_lines_are_complete_ordered_and_written_at_once(tmp_path):
    tracker = JsonlTracker(tmp_path / "new" / "run")
    path = tmp_path / "new" / "run" / "rounds.jsonl"
    tracker.log(1, {"b": 0.5, "a": math.nan, "n": np.int64(3), "t": torch.tensor(0.25)})
    assert path.read_text() == '{"round": 1, "a": null, "b": 0.5, "n": 3, "t": 0.25}\n'
    tracker.log(2, {"a": math.inf, "b": np.float32(0.5)})
    tracker.summary({"a": 1.0})
    tracker.close()
    tracker.close()
    assert [json.loads(line) for line in path.read_text().splitlines()][1] == {"round": 2, "a": None, "b": 0.5}


def test_jsonl_refuses_a_folder_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FedpersError, match=r"Cannot write .*rounds\.jsonl: .*\.$"):
        make_trackers(TrackerConfig(), tmp_path / "file" / "run", "run", {}, 3)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_jsonl_reports_a_full_disk(tmp_path):
    (tmp_path / "rounds.jsonl").symlink_to("/dev/full")
    tracker = JsonlTracker(tmp_path)
    with pytest.raises(FedpersError, match="No space left"):
        tracker.log(1, METRICS)


@pytest.mark.parametrize("broken", ["log", "summary", "close"])
def test_a_failing_tracker_is_switched_off_with_one_warning(broken, caplog):
    required, good, bad = Recorder(), Recorder(), Recorder(broken)
    with Trackers(required, {"bad": lambda: bad, "good": lambda: good}) as trackers:
        for round in (1, 2):
            trackers.log(round, METRICS)
        trackers.summary(METRICS)
        assert trackers.names == (["bad", "good"] if broken == "close" else ["good"])
    expected = [("log", 1, METRICS), ("log", 2, METRICS), ("summary", METRICS), ("close",)]
    assert required.calls == good.calls == expected
    assert [call[0] for call in bad.calls].count(broken) <= 2
    assert bad.calls[-1] == ("close",)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"Tracker 'bad' failed and is switched off for this run: no {broken}"


def test_a_tracker_that_cannot_be_made_is_switched_off(caplog):
    def make():
        raise ImportError("No module named 'nowhere'")

    good = Recorder()
    trackers = Trackers(Recorder(), {"bad": make, "good": lambda: good})
    trackers.log(1, METRICS)
    assert trackers.names == ["good"]
    assert good.calls == [("log", 1, METRICS)]
    assert "'bad'" in caplog.text
    assert "nowhere" in caplog.text


def test_the_required_tracker_is_not_switched_off():
    good = Recorder()
    trackers = Trackers(Recorder("close"), {"good": lambda: good})
    with pytest.raises(RuntimeError, match="no\nclose"):
        trackers.close()
    assert good.calls == [("close",)]
    with pytest.raises(RuntimeError, match="no\nlog"):
        Trackers(Recorder("log"), {}).log(1, METRICS)


def test_ctrl_c_passes_through():
    class Stopped(Recorder):
        def log(self, round, metrics):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trackers(Recorder(), {"stopped": Stopped}).log(1, METRICS)


def test_console_shows_progress_on_a_terminal_and_nothing_elsewhere():
    shown = {}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        tracker = ConsoleTracker(4, "fedrep [x]", console=console)
        tracker.log(1, {"validation/accuracy": 0.8125})
        tracker.log(2, {})
        tracker.summary(METRICS)
        tracker.close()
        tracker.close()
        shown[terminal] = console.file.getvalue()
    assert shown[False] == ""
    assert "fedrep [x]" in shown[True]
    last = [line for line in shown[True].splitlines() if "2/4" in line][-1]
    assert "val 81.2 %" in last


def test_console_writes_lines_of_long_runs_where_there_is_no_terminal(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=20)
    tracker = ConsoleTracker(40, "fedrep [x]", console=console, done=10)
    for round, seconds, metrics in [
        (12, 20, METRICS),
        (14, 40, {}),
        (15, 50, METRICS),
        (16, 60, METRICS),
        (26, 109, {}),
        (27, 110, {}),
        (28, 120, METRICS),
        (40, 150, METRICS),
    ]:
        now[0] = seconds
        tracker.log(round, metrics)
    tracker.close()
    assert console.file.getvalue() == (
        "fedrep [x]: round 15 of 40, val 50.0 %, 10 s a round\n"
        "fedrep [x]: round 27 of 40, 6.5 s a round\n"  # a minute without a score
    )


def test_console_writes_no_lines_within_a_sweep(monkeypatch):
    monkeypatch.setattr(sys, "stderr", WithoutProgress(io.StringIO()))
    monkeypatch.setattr(console_module, "_SECONDS_PER_LINE", 0.0)
    console = Console(file=io.StringIO())
    tracker = ConsoleTracker(4, "fedrep", console=console)
    tracker.log(1, METRICS)
    tracker.close()
    assert console.file.getvalue() == ""


def test_tensorboard_events_have_the_same_names(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrackerConfig(tensorboard=TensorBoardConfig())
    with make_trackers(config, tmp_path, "run", {"seed": 7}, 2) as trackers:
        assert trackers.names == ["tensorboard", "console"]
        trackers.log(1, METRICS)
        trackers.log(2, METRICS | {"validation/accuracy": 0.75})
        trackers.summary({"test/accuracy": 0.5})
        trackers.clients({"selected/test/accuracy": [0.25, 0.5, 0.75]})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {*METRICS, "summary/test/accuracy"}
    assert [(e.step, e.value) for e in events.Scalars("validation/accuracy")] == [(1, 0.5), (2, 0.75)]
    (histogram,) = events.Histograms("clients/selected/test/accuracy")
    assert (histogram.histogram_value.num, histogram.histogram_value.min, histogram.histogram_value.max) == (
        3,
        0.25,
        0.75,
    )
    (text,) = events.Tensors("config/text_summary")
    assert '"seed": 7' in text.tensor_proto.string_val[0].decode()
    assert len((tmp_path / "rounds.jsonl").read_text().splitlines()) == 2


SCRIPT = """
import sys
from pathlib import Path
from fedpers.tracking import TrackerConfig, WandbConfig, make_trackers
loaded = {"wandb", "tensorboard", "torch.utils.tensorboard"} & set(sys.modules)
assert not loaded, loaded
config = TrackerConfig(wandb=WandbConfig(project="a-project", group="a-group"))
with make_trackers(config, Path(sys.argv[1]), "a-run", {"seed": 7}, 1) as trackers:
    assert trackers.names == ["wandb", "console"], trackers.names
    trackers.log(1, {"validation/accuracy": 0.5, "loss": float("nan")})
    trackers.summary({"test/accuracy": 0.5})
    trackers.clients({"selected/test/accuracy": [0.25, 0.5, 0.75]})
"""


@pytest.mark.slow
def test_wandb_without_login_is_offline_silent_and_inside_the_run_folder(tmp_path, no_login):
    # every connection it tried would go through this proxy, which counts them
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"), address)
        environment = os.environ | proxies | {"HOME": str(tmp_path / "home")}
        (tmp_path / "home").mkdir()
        root = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "run")],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        proxy.settimeout(0.2)
        with pytest.raises(TimeoutError):
            proxy.accept()
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    for text in (b"a-project", b"a-group", b"a-run", b"clients/selected/test/accuracy", b"histogram"):
        assert text in content
    rounds, summary = tracked.of_wandb(tmp_path / "run")
    assert rounds[1]["validation/accuracy"] == 0.5
    assert summary["test/accuracy"] == 0.5
    assert not list((tmp_path / "home").rglob("*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "run"]


def test_wandb_online_without_login_is_refused_rather_than_prompted(tmp_path, no_login, caplog):
    with pytest.raises(FedpersError, match="wandb login"):
        WandbTracker(WandbConfig(mode="online"), tmp_path, "run", {})
    trackers = make_trackers(TrackerConfig(wandb=WandbConfig(mode="online")), tmp_path, "run", {}, 1)
    trackers.close()
    assert caplog.text.count("Tracker 'wandb' failed") == 1


def test_wandb_login_is_found_where_wandb_keeps_it(no_login, monkeypatch):
    assert not _logged_in()
    no_login.write_text("machine elsewhere login user password x\n")
    assert not _logged_in()
    no_login.write_text("machine api.wandb.ai login user password x\n")
    assert _logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not _logged_in()
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(no_login.parent))
    (no_login.parent / "settings").write_text("[default]\nbase_url = https://elsewhere:8080\n")
    assert not _logged_in()  # what wandb login --host wrote
    no_login.write_text("machine elsewhere:8080 login user password x\n")
    assert _logged_in()
    (no_login.parent / "settings").write_text("no section")
    assert not _logged_in()
    no_login.write_text("machine broken")
    assert not _logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert _logged_in()


@pytest.mark.parametrize("tail", ["", '{"round": 2', '{"round": 2}\n{"round": 3}\n', "\n\n"])
def test_jsonl_of_a_resumed_run_goes_on_after_its_last_round(tail, tmp_path):
    path = tmp_path / "rounds.jsonl"
    path.write_text('{"round": 0}\n{"round": 1, "a": 0.5}\n' + tail)
    tracker = JsonlTracker(tmp_path, Resumed(2))
    tracker.log(2, {"a": 0.25})
    tracker.sync()
    tracker.close()
    assert path.read_text() == '{"round": 0}\n{"round": 1, "a": 0.5}\n{"round": 2, "a": 0.25}\n'


@pytest.mark.parametrize("text", ["", '{"round": 0}\n', '{"round": 0}\n{"round": 1}', '{"round": 0}\n{"round": 2}\n',
                                  '{"round": 0}\n[1]\n', '{"round": 0}\nnull\n'])  # fmt: skip
def test_jsonl_that_lacks_a_round_is_left_as_it_is(text, tmp_path):
    (tmp_path / "rounds.jsonl").write_text(text)
    with pytest.raises(FedpersError, match=r"rounds\.jsonl lacks round [01], after which the run would be resumed\.$"):
        JsonlTracker(tmp_path, Resumed(2))
    assert (tmp_path / "rounds.jsonl").read_text() == text
    (tmp_path / "rounds.jsonl").unlink()
    with pytest.raises(FedpersError, match=r"Cannot write .*: No such file"):
        JsonlTracker(tmp_path, Resumed(2))


def test_tensorboard_of_a_resumed_run_shows_each_round_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrackerConfig(tensorboard=TensorBoardConfig())
    for resumed, rounds in ((None, (0, 1, 2, 3)), (Resumed(2), (2, 3, 4))):
        with make_trackers(config, tmp_path, "run", {}, 4, resumed=resumed) as trackers:
            for round in rounds:
                trackers.log(round, {"a": float(round)})
            trackers.summary({"a": float(round)})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("a")] == [0, 1, 2, 3, 4]
    assert [event.value for event in events.Scalars("summary/a")] == [4]


SILENT = """
import sys
from pathlib import Path
from fedpers.tracking import TrackerConfig, WandbConfig, make_trackers
from fedpers.tracking import weights_and_biases as module
module.INIT_SECONDS = 1.0
with make_trackers(TrackerConfig(wandb=WandbConfig(mode="online")), Path(sys.argv[1]), "run", {}, 1) as trackers:
    assert trackers.names == ["console"], trackers.names
    trackers.log(0, {"a": 0.5})
"""


@pytest.mark.slow
@pytest.mark.parametrize("listening", [True, False])
def test_a_wandb_server_that_does_not_answer_does_not_hold_a_run_up(listening, tmp_path, no_login):
    """It takes connections and is silent, or takes none."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if not listening:
            server.close()
        root = str(Path(__file__).parents[2])
        environment = os.environ | {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": address, "HOME": str(tmp_path)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        result = subprocess.run(
            [sys.executable, "-c", SILENT, str(tmp_path / "run")],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "Tracker 'wandb' failed and is switched off for this run" in result.stderr
    assert (tmp_path / "run" / "rounds.jsonl").read_text() == '{"round": 0, "a": 0.5}\n'


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match=r"tracker\.wandb\.mode=onlin: .*did you mean 'online'"):
        WandbConfig(mode="onlin")
    with pytest.raises(ConfigError, match=r"tracker\.tensorboard\.flush_secs=0"):
        TensorBoardConfig(flush_secs=0)
