"""The cluster of the Ray tests."""

from tests.ray.conftest import cluster as cluster
