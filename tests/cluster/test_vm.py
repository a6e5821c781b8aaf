"""The files for virtual machines: valid for Ray and systemd, and made for spot machines."""

from __future__ import annotations

import configparser
import copy
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.files import CLUSTER, LAUNCHER, ROOT, UNIT, executable, launcher

SERVICE = UNIT.stem
NOTICE = {"aws.yaml": 120, "gcp.yaml": 30}
MARGIN = {"aws.yaml": 20, "gcp.yaml": 10}
"""Seconds from the notice to the end of the machine, and of Ray's deadline before it."""
LOGIND = CLUSTER / "vm" / "logind.conf"


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_finds_the_cluster_file_valid(name: str) -> None:
    prepared = prepare_config(copy.deepcopy(launcher(name)))
    validate_config(prepared)
    # Nothing is taken over from the defaults that are there for other images.
    assert set(prepared["available_node_types"]) == {"head", "spot"}
    assert "conda" not in str(prepared)


def is_spot(name: str, node_type: str) -> bool:
    config = launcher(name)["available_node_types"][node_type]["node_config"]
    if name == "aws.yaml":
        return config.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    return config.get("scheduling", {}).get("provisioningModel") == "SPOT"


@pytest.mark.parametrize("name", LAUNCHER)
def test_workers_are_spot_machines_and_the_head_is_not(name: str) -> None:
    config = launcher(name)
    assert not is_spot(name, config["head_node_type"])
    assert is_spot(name, "spot")
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}


def test_an_instance_gets_its_two_minutes_and_leaves_nothing_that_costs() -> None:
    aws, gcp = (launcher(name)["available_node_types"]["spot"]["node_config"] for name in LAUNCHER)
    assert aws["InstanceMarketOptions"]["SpotOptions"] == {
        "SpotInstanceType": "one-time",
        "InstanceInterruptionBehavior": "terminate",
    }
    assert gcp["scheduling"]["instanceTerminationAction"] == "DELETE"
    assert gcp["scheduling"]["automaticRestart"] is False
    for name in LAUNCHER:
        assert launcher(name)["provider"]["cache_stopped_nodes"] is False


@pytest.mark.parametrize("name", LAUNCHER)
def test_workers_can_write_to_the_bucket(name: str) -> None:
    config = launcher(name)["available_node_types"]["spot"]["node_config"]
    assert config["IamInstanceProfile" if name == "aws.yaml" else "serviceAccounts"]


@pytest.mark.parametrize("name", LAUNCHER)
def test_whatever_is_copied_exists_and_is_enough_to_install(name: str) -> None:
    mounts = launcher(name)["file_mounts"]
    for remote, local in mounts.items():
        assert remote == f"~/app/{local}"
        assert (ROOT / local).exists()
    assert {"ray_accel_ckpt", "pyproject.toml", "README.md", "LICENSE"} <= set(mounts.values())
    for command in launcher(name)["setup_commands"] + launcher(name)["worker_setup_commands"]:
        for path in re.findall(r"~/app/(\S+)", command):
            assert (ROOT / path).is_file()


@pytest.mark.parametrize("name", LAUNCHER)
def test_workers_watch_for_notices_and_the_head_does_not(name: str) -> None:
    config = launcher(name)
    setup, start = "\n".join(config["worker_setup_commands"]), config["worker_start_ray_commands"]
    assert f"{SERVICE}.service /etc/systemd/system/" in setup
    assert "daemon-reload" in setup
    assert "restart systemd-logind" in setup
    # The watcher drains when it is stopped: whatever it drains then must not be the new Ray.
    assert start[:2] == [f"sudo systemctl stop {SERVICE} || true", "ray stop"]
    ray, service = start[2:]
    assert "ray start --address=$RAY_HEAD_IP:6379" in ray
    cloud = name.removesuffix(".yaml")
    options = (
        f'echo "WATCH_NODE_OPTIONS=--cloud {cloud} --address $RAY_HEAD_IP:6379 '
        f'--margin {MARGIN[name]}"'
    )
    assert service.startswith(f"{options} | sudo tee {settings()['EnvironmentFile'].lstrip('-')}")
    assert f"sudo systemctl enable {SERVICE}" in service
    assert f"sudo systemctl start {SERVICE}" in service
    head = [*config["setup_commands"], *config["head_setup_commands"]]
    assert not any("watch-node" in c for c in [*head, *config["head_start_ray_commands"]])


@pytest.mark.parametrize("name", LAUNCHER)
def test_every_command_is_sound_shell(name: str) -> None:
    shellcheck = executable("shellcheck")
    if shellcheck is None:
        pytest.skip("no shellcheck here")
    commands = [
        c for key, all_ in launcher(name).items() if key.endswith("_commands") for c in all_
    ]
    # Ray sets the first; pip, not the shell, is to see the tilde of the option.
    script = "\n".join(["#!/bin/bash", "export RAY_HEAD_IP=10.0.0.1", *commands, ""])
    # SC2016: PATH is to be expanded at login.
    checked = subprocess.run(
        [shellcheck, "--exclude=SC2016", "-"], input=script, text=True, capture_output=True
    )
    assert checked.returncode == 0, checked.stdout


def settings() -> dict[str, str]:
    """The [Service] section; of settings that stand twice, the last."""
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(UNIT.read_text())
    return dict(unit["Service"])


def verify(unit: str, folder: Path) -> str:
    """What `systemd-analyze verify` says against it; nothing if it is sound."""
    analyze = executable("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze here")
    copied = folder / UNIT.name
    copied.write_text(unit)
    checked = subprocess.run([analyze, "verify", str(copied)], text=True, capture_output=True)
    said = checked.stdout + checked.stderr
    return said or ("" if checked.returncode == 0 else f"status {checked.returncode}")


def test_systemd_finds_the_unit_sound(tmp_path: Path) -> None:
    # It wants to see the program, which is there on the cluster's machines only.
    unit = UNIT.read_text().replace("/usr/bin/systemd-inhibit", "/bin/true")
    assert verify(unit, tmp_path) == ""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("Restart=always", "Restart=forever"),
        ("TimeoutStopSec=", "TimeoutStoppSec="),
        ("/usr/bin/systemd-inhibit", "/no/such/program"),
    ],
)
def test_a_mistake_in_the_unit_would_be_found(tmp_path: Path, right: str, wrong: str) -> None:
    assert right in UNIT.read_text()
    assert verify(UNIT.read_text().replace(right, wrong), tmp_path) != ""


def test_the_unit_starts_the_watcher_again_and_lets_it_end() -> None:
    service = settings()
    assert service["Restart"] == "always"
    assert "StartLimitIntervalSec=0" in UNIT.read_text()
    assert (service["KillSignal"], service["KillMode"]) == ("SIGTERM", "control-group")
    assert int(service["TimeoutStopSec"]) > 120, "EC2's notice"
    assert service["User"] == launcher("aws.yaml")["auth"]["ssh_user"]
    assert service["User"] == launcher("gcp.yaml")["auth"]["ssh_user"]
    # Ray says in /tmp/ray where it runs.
    assert service["PrivateTmp"] == "no"


def test_the_unit_runs_what_the_setup_installs_and_holds_up_a_shutdown() -> None:
    inhibit, *words = shlex.split(settings()["ExecStart"])
    options = [word for word in words if word.startswith("--")]
    assert inhibit == "/usr/bin/systemd-inhibit"
    assert {"--what=shutdown", "--mode=delay"} <= set(options)
    assert words[len(options) :] == [
        "/opt/ray-accel-ckpt/bin/ray-accel-ckpt",
        "watch-node",
        "$WATCH_NODE_OPTIONS",
    ]
    for name in LAUNCHER:
        assert "python3 -m venv /opt/ray-accel-ckpt" in "\n".join(launcher(name)["setup_commands"])


def test_a_shutdown_is_held_up_past_rays_deadline_and_for_less_than_gcp_gives() -> None:
    parser = configparser.ConfigParser()
    parser.read_string(LOGIND.read_text())
    assert parser.sections() == ["Login"]
    assert list(parser["Login"]) == ["inhibitdelaymaxsec"]
    held = int(parser["Login"]["InhibitDelayMaxSec"])
    assert NOTICE["gcp.yaml"] - MARGIN["gcp.yaml"] < held < NOTICE["gcp.yaml"]
    for name in LAUNCHER:
        (command,) = (c for c in launcher(name)["worker_setup_commands"] if "logind.conf" in c)
        # Above Ubuntu's own, which is called unattended-upgrades-*.
        assert command.endswith("/etc/systemd/logind.conf.d/zz-ray-accel-ckpt.conf")
