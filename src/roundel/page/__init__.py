"""The report as a page to be read offline."""

from roundel.page.document import PAGE, document, page
from roundel.page.findings import Cost, decibel, duration, fallbacks, read_costs, relative_error

__all__ = ["PAGE", "Cost", "decibel", "document", "duration", "fallbacks", "page", "read_costs", "relative_error"]
