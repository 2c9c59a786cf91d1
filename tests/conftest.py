"""Settings of all tests."""

from hypothesis import HealthCheck, settings

# time limits measure the machine, not the code
settings.register_profile("reshard", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("reshard")
