"""Scatterbrain inside existing models: one call replaces their attention modules and reports on each."""

from scatterbrain.integrations.dropout import set_attention_dropout
from scatterbrain.integrations.replace import replace_attention
from scatterbrain.integrations.replacer import Replacer, register_replacer
from scatterbrain.integrations.report import Entry, Report
from scatterbrain.integrations.restrictions import NotReplaceable

Handler, register_handler = Replacer, register_replacer  # earlier names

__all__ = [
    "Entry",
    "Handler",
    "NotReplaceable",
    "Replacer",
    "Report",
    "register_handler",
    "register_replacer",
    "replace_attention",
    "set_attention_dropout",
]
