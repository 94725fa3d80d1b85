"""What keeps a store in good order: finding every defect of it."""

from timstore.verification.findings import Finding, Verification
from timstore.verification.verification import verify

__all__ = ["Finding", "Verification", "verify"]
