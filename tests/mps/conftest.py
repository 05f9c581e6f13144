"""What the tests of MPS share."""

from tests.mps.fixtures import any_mps, every_mps, fake_mps

__all__ = ["any_mps", "every_mps", "fake_mps"]
