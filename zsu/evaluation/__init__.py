"""Has it forgotten? Each measure is one small function; `audit` puts them into one table."""

from .report import audit, table
from .utility import accuracy, jensen_shannon, predict

__all__ = ["accuracy", "audit", "jensen_shannon", "predict", "table"]
