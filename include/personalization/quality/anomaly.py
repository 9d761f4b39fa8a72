"""What an anomaly is."""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Anomaly:
    """Something a person should look at."""

    severity: Severity
    run_id: str | None
    """None where no run is to blame: of the API."""
    run_started_at: datetime | None
    """Of an anomaly of the API, when it began."""
    stage: str
    """The stage, or what else it is about: a route of the API."""
    title: str
    """Names the kind, and holds no figure."""
    evidence: str
    advice: str
    observed: float | None = None
    """The figure that stands out, beside what was expected of it, and how far chance moves that: by scores."""
    expected: float | None = None
    score: float | None = None
    """In robust standard deviations; None of a rule, which knows no chance."""
    user_id: str | None = None
    """The user it is about; goes with the user's erasure."""

    @property
    def anomaly_id(self) -> str:
        """The same however often it is found. Tells nothing of the user."""
        moment = self.run_started_at.date().isoformat() if self.run_id is None and self.run_started_at else ""
        about = (self.run_id or moment, self.stage, self.title, self.user_id or "")
        return hashlib.blake2b("\0".join(about).encode(), digest_size=12, person=b"anomaly").hexdigest()
