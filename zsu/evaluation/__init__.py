"""Has it forgotten? Each measure is one small function; `audit` asks them all and puts them into a `Report`."""

from .audits import audit
from .measures import BASIC, CONTROLS, MEASURES
from .observed import predict
from .report import Report
from .utility import accuracy, jensen_shannon

__all__ = ["BASIC", "CONTROLS", "MEASURES", "Report", "accuracy", "audit", "jensen_shannon", "predict"]
