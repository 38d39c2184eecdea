"""Settings of all tests."""

import os

from hypothesis import HealthCheck, settings

# Small tensors, several processes: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "project",
    deadline=None,  # time is measured in benchmarks, on quiet machines
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=os.environ.get("CI") == "true",
)
settings.load_profile("project")
