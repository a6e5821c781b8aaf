"""The files of `cluster/`, and what several tests ask of them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"

RUNS = ("rayjob.yaml", "raycluster.yaml")
PROVIDERS = ("gke.yaml", "eks.yaml")
LAUNCHER = ("aws.yaml", "gcp.yaml")
UNIT = CLUSTER / "vm" / "ray-accel-ckpt-watch-node.service"


def documents(name: str) -> list[dict[str, Any]]:
    """The documents of a file for Kubernetes."""
    return list(yaml.safe_load_all((CLUSTER / "kuberay" / name).read_text()))


def of_kind(name: str, kind: str) -> dict[str, Any]:
    (found,) = (document for document in documents(name) if document["kind"] == kind)
    return found


def cluster_spec(name: str) -> dict[str, Any]:
    """The RayCluster's specification, a RayJob's inner one too."""
    spec = documents(name)[0]["spec"]
    return spec.get("rayClusterSpec", spec)


def head(name: str) -> dict[str, Any]:
    return cluster_spec(name)["headGroupSpec"]


def workers(name: str) -> dict[str, Any]:
    (group,) = cluster_spec(name)["workerGroupSpecs"]
    return group


def environment(group: dict[str, Any], provider: str) -> dict[str, str]:
    """The environment of the container that runs Ray, with what the provider's file has for it."""
    config = of_kind(provider, "ConfigMap")
    found = {}
    for variable in ray_container(group)["env"]:
        if "value" in variable:
            found[variable["name"]] = variable["value"]
        else:
            source = variable["valueFrom"]["configMapKeyRef"]
            assert source["name"] == config["metadata"]["name"]
            found[variable["name"]] = config["data"][source["key"]]
    return found


def ray_container(group: dict[str, Any]) -> dict[str, Any]:
    """KubeRay runs Ray in the first container of a pod."""
    return group["template"]["spec"]["containers"][0]


def launcher(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "vm" / name).read_text())


def executable(name: str) -> str | None:
    """Of the environment that runs the tests, else of the machine."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(
        name, path=os.environ["PATH"]
    )
