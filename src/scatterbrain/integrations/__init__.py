"""Scatterbrain inside models that exist: one call swaps their attention modules and says what it did."""

from scatterbrain.integrations.replace import Entry, Handler, Report, register_handler, replace_attention

__all__ = ["Entry", "Handler", "Report", "register_handler", "replace_attention"]
