"""What tests of the native kernels share."""

import pytest

from saekit.sae.kernels import native_build

REASON = native_build.why_not()
needs_native = pytest.mark.skipif(REASON is not None, reason=f"no native kernels here: {REASON}")
