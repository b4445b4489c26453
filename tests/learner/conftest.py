"""Property tests have no deadline of their own: a busy machine is not a failure."""

from hypothesis import settings

settings.register_profile("slipstream", deadline=None)
settings.load_profile("slipstream")
