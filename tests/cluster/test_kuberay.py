"""The files for Kubernetes: valid for KubeRay's own definitions, and made for spot machines."""

from __future__ import annotations

import copy
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.crd import faults, schema_of
from tests.cluster.files import (
    PROVIDERS,
    ROOT,
    RUNS,
    cluster_spec,
    documents,
    environment,
    head,
    of_kind,
    ray_container,
    workers,
)
from tests.cluster.scheduling import ON_DEMAND, SPOT, runs_on

SCHEMAS = Path(os.environ.get("KUBERAY_SCHEMAS", ROOT.parent / "shared" / "schemas"))
DEFINITIONS = {
    "RayJob": SCHEMAS / "kuberay_rayjobs.crd.yaml",
    "RayCluster": SCHEMAS / "kuberay_rayclusters.crd.yaml",
}
# Seconds that an ordinary pod has from SIGTERM on, at least.
NOTICE = {"gke.yaml": 15, "eks.yaml": 100}

DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"


@pytest.fixture(scope="module")
def schemas() -> dict[str, dict[str, Any]]:
    missing = [str(path) for path in DEFINITIONS.values() if not path.exists()]
    if missing:
        pytest.skip(f"KubeRay's definitions are not there: {', '.join(missing)}")
    return {kind: schema_of(path, "v1") for kind, path in DEFINITIONS.items()}


@pytest.mark.parametrize("name", RUNS)
def test_the_custom_resources_are_valid(name: str, schemas: dict[str, dict[str, Any]]) -> None:
    resource = documents(name)[0]
    assert resource["apiVersion"] == "ray.io/v1"
    assert faults(schemas[resource["kind"]], resource) == []


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        (("headGroupSpec", "template", "spec"), "terminationGracePeriod", 100),
        (("headGroupSpec", "rayStartParams"), "num-cpus", 0),
        (("autoscalerOptions",), "version", "v3"),
        (("headGroupSpec", "template", "spec", "containers", 0), "resources", {"limit": {}}),
    ],
)
def test_a_mistake_in_them_would_be_found(
    path: tuple[str, ...], key: str, value: Any, schemas: dict[str, dict[str, Any]]
) -> None:
    resource = copy.deepcopy(of_kind("raycluster.yaml", "RayCluster"))
    where = resource["spec"]
    for step in path:
        where = where[step]
    where[key] = value
    assert len(faults(schemas["RayCluster"], resource)) == 1


SHAPES: dict[str, dict[str, set[str]]] = {
    "ConfigMap": {"v1": {"apiVersion", "kind", "metadata", "data"}},
    "ServiceAccount": {"v1": {"apiVersion", "kind", "metadata"}},
    "PodDisruptionBudget": {"policy/v1": {"apiVersion", "kind", "metadata", "spec"}},
}


@pytest.mark.parametrize("name", [*RUNS, *PROVIDERS])
def test_the_resources_of_kubernetes_itself_have_the_known_fields_only(name: str) -> None:
    for resource in documents(name):
        if resource["kind"] in DEFINITIONS:
            continue
        assert set(resource) == SHAPES[resource["kind"]][resource["apiVersion"]]
        assert set(resource["metadata"]) <= {"name", "annotations"}
        for value in resource.get("data", {}).values():
            assert isinstance(value, str), "a ConfigMap holds strings only"


def test_job_and_cluster_are_the_same_but_for_the_name_of_the_run() -> None:
    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: renamed(each) for key, each in value.items()}
        if isinstance(value, list):
            return [renamed(each) for each in value]
        return "RUN" if value in ("digits", "spot") else value

    assert renamed(cluster_spec("rayjob.yaml")) == renamed(cluster_spec("raycluster.yaml"))


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_ray_drains_and_ends_before_it_is_killed(name: str, provider: str) -> None:
    group = workers(name)
    grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
    drain = int(environment(group, provider)[DRAIN])
    assert 0 < drain < grace
    # A node that dies before its drain's deadline counts as failed.
    assert drain < NOTICE[provider]
    assert grace < 120, "EC2's notice"
    assert "lifecycle" not in ray_container(group), "a preStop hook eats from the notice"
    # The head neither drains nor waits when the cluster is taken down.
    assert environment(head(name), provider)[DRAIN] == "0"


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("cloud", SPOT)
def test_workers_run_on_spot_nodes_and_the_head_does_not(name: str, cloud: str) -> None:
    assert runs_on(workers(name)["template"]["spec"], SPOT[cloud])
    assert not runs_on(head(name)["template"]["spec"], SPOT[cloud])


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("cloud", ON_DEMAND)
def test_the_head_runs_on_demand_and_workers_do_not(name: str, cloud: str) -> None:
    assert runs_on(head(name)["template"]["spec"], ON_DEMAND[cloud])
    assert not runs_on(workers(name)["template"]["spec"], ON_DEMAND[cloud])


def bytes_of(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 1 << 20, "Gi": 1 << 30}[unit]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("group_of", [head, workers])
def test_shared_memory_is_memory_and_holds_the_object_store(name: str, group_of: Any) -> None:
    group = group_of(name)
    container = ray_container(group)
    (mount,) = (m for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm")
    (volume,) = (v for v in group["template"]["spec"]["volumes"] if v["name"] == mount["name"])
    assert volume["emptyDir"]["medium"] == "Memory"
    size = bytes_of(volume["emptyDir"]["sizeLimit"])
    memory = bytes_of(container["resources"]["limits"]["memory"])
    assert int(group["rayStartParams"]["object-store-memory"]) < size <= memory // 2
    assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.parametrize("name", RUNS)
def test_the_disruption_budget_holds_the_head_and_nothing_else(name: str) -> None:
    budget = of_kind(name, "PodDisruptionBudget")["spec"]
    assert set(budget) == {"minAvailable", "selector"}
    assert budget["minAvailable"] == 1
    wanted = budget["selector"]["matchLabels"].items()

    def labels(group: dict[str, Any], node_type: str) -> dict[str, str]:
        # KubeRay adds the node type to the labels of the template.
        return {**group["template"]["metadata"]["labels"], "ray.io/node-type": node_type}

    assert wanted <= labels(head(name), "head").items()
    assert not wanted <= labels(workers(name), "worker").items()
    other = "raycluster.yaml" if name == "rayjob.yaml" else "rayjob.yaml"
    assert not wanted <= labels(head(other), "head").items()
    # On a worker it would hold up the eviction that brings the notice.
    assert "annotations" not in workers(name)["template"]["metadata"]
    assert head(name)["template"]["metadata"]["annotations"] == {
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        "karpenter.sh/do-not-disrupt": "true",
    }


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_pods_find_the_service_account_and_the_storage(name: str, provider: str) -> None:
    account = of_kind(provider, "ServiceAccount")["metadata"]["name"]
    for group in (head(name), workers(name)):
        assert group["template"]["spec"]["serviceAccountName"] == account
    scheme = {"gke.yaml": "gs://", "eks.yaml": "s3://"}[provider]
    assert environment(head(name), provider)["STORAGE"].startswith(scheme)


@pytest.mark.parametrize("name", RUNS)
def test_the_cluster_grows_from_nothing_and_its_head_does_not_train(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["enableInTreeAutoscaling"] is True
    assert 0 == workers(name)["minReplicas"] < workers(name)["maxReplicas"]
    assert head(name)["rayStartParams"]["num-cpus"] == "0"
    for group in (head(name), workers(name)):
        # Autoscaler v2 asks for it.
        assert group["template"]["spec"]["restartPolicy"] == "Never"
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"] is True


def test_the_job_runs_an_example_under_a_fixed_name_and_is_tried_again() -> None:
    job = of_kind("rayjob.yaml", "RayJob")
    spec = job["spec"]
    python, script, *arguments = spec["entrypoint"].split()
    assert python == "python"
    assert (ROOT / Path(script).relative_to("/home/ray/app")).is_file()
    assert arguments == ["--storage", '"$STORAGE"', "--name", job["metadata"]["name"]]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["submissionMode"] == "HTTPMode", "only then does a shell on the head see $STORAGE"


@pytest.mark.parametrize("name", RUNS)
def test_all_pods_run_the_image_of_this_version(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for group in (head(name), workers(name)):
        image = ray_container(group)["image"]
        assert image == f"registry.example.com/ray-accel-ckpt:{project['version']}"
