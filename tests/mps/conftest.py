"""What the tests of MPS share."""

from tests.mps.fixtures import fake_mps

__all__ = ["fake_mps"]
