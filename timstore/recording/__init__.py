"""Recording: torch hooks to records, optimizer state to steps."""

from timstore.recording.forecast import Forecast, forecast_of
from timstore.recording.recorder import Recorder

__all__ = ["Forecast", "Recorder", "forecast_of"]
