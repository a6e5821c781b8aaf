"""Where Kubernetes would put a pod: the part of its rules that the files use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Node:
    labels: dict[str, str]
    taints: tuple[dict[str, str], ...] = field(default=())


def _taint(key: str, value: str) -> tuple[dict[str, str], ...]:
    return ({"key": key, "value": value, "effect": "NoSchedule"},)


GKE, EKS, KARPENTER = (
    "cloud.google.com/gke-spot",
    "eks.amazonaws.com/capacityType",
    "karpenter.sh/capacity-type",
)

SPOT = {
    "GKE": Node(labels={GKE: "true"}),
    "GKE, tainted": Node(labels={GKE: "true"}, taints=_taint(GKE, "true")),
    "GKE, GPU": Node(labels={GKE: "true"}, taints=_taint("nvidia.com/gpu", "present")),
    "EKS": Node(labels={EKS: "SPOT"}),
    "EKS, tainted": Node(labels={EKS: "SPOT"}, taints=_taint(EKS, "SPOT")),
    "Karpenter": Node(labels={KARPENTER: "spot"}),
    "Karpenter, tainted": Node(labels={KARPENTER: "spot"}, taints=_taint(KARPENTER, "spot")),
}
ON_DEMAND = {
    "GKE": Node(labels={}),
    "EKS": Node(labels={EKS: "ON_DEMAND"}),
    "Karpenter": Node(labels={KARPENTER: "on-demand"}),
}


def runs_on(pod: dict[str, Any], node: Node) -> bool:
    """Whether the pod's required affinity fits the node and it tolerates all of its taints."""
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    fits = any(
        all(_fits(expression, node.labels) for expression in term["matchExpressions"])
        for term in terms["nodeSelectorTerms"]
    )
    return fits and all(
        any(_tolerates(toleration, taint) for toleration in pod.get("tolerations", []))
        for taint in node.taints
    )


def _fits(expression: dict[str, Any], labels: dict[str, str]) -> bool:
    value = labels.get(expression["key"])
    if expression["operator"] == "In":
        return value in expression["values"]
    assert expression["operator"] == "NotIn"
    return value not in expression["values"]


def _tolerates(toleration: dict[str, str], taint: dict[str, str]) -> bool:
    same = toleration["key"] == taint["key"] and toleration["effect"] == taint["effect"]
    if toleration["operator"] == "Exists":
        return same
    assert toleration["operator"] == "Equal"
    return same and toleration["value"] == taint["value"]
