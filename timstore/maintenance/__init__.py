"""What keeps a store in good order: finding every defect of it."""

from timstore.maintenance.findings import Finding, Verification
from timstore.maintenance.verification import verify

__all__ = ["Finding", "Verification", "verify"]
