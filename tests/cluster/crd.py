"""Is a document valid for a CustomResourceDefinition? As strict as `kubectl apply` is.

An API server checks types, required fields and enumerations as JSON schema says, and refuses (or
drops) every field that the schema does not know, which JSON schema by itself lets pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml


def schema_of(definition: Path, version: str) -> dict[str, Any]:
    """The schema of one version; what is below `metadata` is the API server's own business."""
    crd = yaml.load(definition.read_text(), Loader=yaml.CSafeLoader)
    (found,) = (v for v in crd["spec"]["versions"] if v["name"] == version)
    assert found["served"]
    schema: dict[str, Any] = found["schema"]["openAPIV3Schema"]
    return schema


def faults(schema: dict[str, Any], document: dict[str, Any]) -> list[str]:
    """What an API server would find wrong, sorted; nothing if it is valid."""
    body = {key: value for key, value in document.items() if key != "metadata"}
    wrong = [
        f"{error.json_path}: {error.message}"
        for error in jsonschema.Draft202012Validator(schema).iter_errors(body)
    ]
    return sorted([*wrong, *_unknown(schema, body, "$")])


def _unknown(schema: dict[str, Any], value: Any, where: str) -> Iterator[str]:
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, list):
        for index, each in enumerate(value):
            yield from _unknown(schema.get("items", {}), each, f"{where}[{index}]")
    elif isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, each in value.items():
            if key in known:
                yield from _unknown(known[key], each, f"{where}.{key}")
            elif isinstance(others, dict):
                yield from _unknown(others, each, f"{where}.{key}")
            elif not others:
                yield f"{where}.{key}: unknown field"
