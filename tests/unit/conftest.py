"""Unit tests need no service and no network."""

from hypothesis import HealthCheck, settings

# The machine's load must fail no test: laws are checked by examples, not by their time.
settings.register_profile("millrace", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("millrace")
