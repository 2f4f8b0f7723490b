"""Gate queries of single tokens, in one launch."""

from seerattn.ops.gate_query.api import gate_queries as gate_queries
