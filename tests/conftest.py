"""What all tests share.

Hypothesis draws the same examples at every run, so that `make test` means the same today and tomorrow; `make nightly`
draws new ones and looks further.
"""

from __future__ import annotations

import logging
import os

from hypothesis import settings

# A scripted peer in a thread may outlive the test whose captured stream it logs to; that is no finding of the next test.
logging.raiseExceptions = False

settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("explore" if os.environ.get("SLIPSTREAM_EXPLORE") else "steady")
