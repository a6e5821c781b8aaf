"""For all tests.

The machine may be slow and shared, so no property test is held to a time. And processes
that tests start must hear Ctrl-C, which those of a test run in the background do not.
"""

import signal

from hypothesis import HealthCheck, settings

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

signal.signal(signal.SIGINT, signal.default_int_handler)
