"""Hypothesis for the property tier: the same examples in every run, no wall clock."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "property",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("property")
