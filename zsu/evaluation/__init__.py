"""Has it forgotten? Each measure is one small function; `audit` asks them all and puts them into a `Report`."""

from .outputs import predict
from .report import BASIC, CONTROLS, MEASURES, Report, audit
from .utility import accuracy, jensen_shannon

__all__ = ["BASIC", "CONTROLS", "MEASURES", "Report", "accuracy", "audit", "jensen_shannon", "predict"]
